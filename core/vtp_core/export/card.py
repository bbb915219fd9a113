"""The model card of an export: what it is, its data, its numbers with their protocols, its stack, its licences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import yaml
from torch import Tensor

from vtp_core.export.licences import licences_of
from vtp_core.run.environment import masked
from vtp_core.stack import Stack
from vtp_core.statistics import digest, hexed

if TYPE_CHECKING:
    from vtp_core.export.source import Source


def card_of(source: Source, notes: Sequence[str], use: str, files: Sequence[str] = ()) -> str:
    """The model card of what is exported from ``source``.

    Args:
        source: what is exported.
        notes: what else should be known.
        use: Python that loads it.
        files: lines on the files, where they say more than a tokenizer's.
    """
    weights = "the EMA's" if source.weights == "ema" else "the student's"
    origin = "From the VTP release." if source.base else f"Weights: {weights}, of step {source.step}."
    return model_card(
        source.stack, source.parts, origin=origin, load=use, data=source.data, rows=source.rows,
        released=source.base is not None, notes=notes, files=files,
    )  # fmt: skip


def shown_stack(stack: Stack) -> str:
    """The stack as YAML, secrets masked, without the places of its run and of the run that it began from."""
    tree = {key: node for key, node in masked(stack.config).items() if key != "run"}
    if isinstance(tree.get("tokenizer"), dict) and tree["tokenizer"].get("from"):
        tree["tokenizer"]["from"] = PurePath(tree["tokenizer"]["from"]).name
    return str(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=110))


def model_card(
    stack: Stack,
    parts: Mapping[str, Mapping[str, Tensor]],
    *,
    origin: str,
    load: str,
    data: str = "",
    rows: Sequence[Mapping[str, Any]] = (),
    released: bool = False,
    notes: Sequence[str] = (),
    files: Sequence[str] = (),
) -> str:
    """The text of ``README.md``; equal arguments give equal text.

    Args:
        stack: of the run.
        parts: what is exported.
        origin: which weights these are, in one line.
        load: Python that loads them.
        data: fingerprint of the data.
        rows: of ``probes.jsonl``.
        released: whether the weights are those of the VTP release.
        notes: what else should be known.
        files: lines on the files.
    """
    sections = {
        f"# {_line(stack.name)}": [
            "A visual tokenizer. " + _line(origin),
            *(f"- {_line(note)}" for note in notes),
        ],
        "## Use": ["```python", load, "```"],
        **({"## Files": files} if files else {}),
        "## Parameters": table(("part", "parameters"), _sizes(parts)),
        "## Data": _data(stack, data, released),
        "## Numbers": _numbers(rows),
        "## Stack": ["```yaml", shown_stack(stack).replace("```", "'''").rstrip(), "```"],
        "## Licences": [f"- {_line(text)}" for text in licences_of(stack, released)],
    }
    head = "---\nlibrary_name: vtp-plugins\ntags: [visual-tokenizer, vtp]\n---\n"
    return head + "".join(f"\n{title}\n\n" + "\n".join(lines) + "\n" for title, lines in sections.items())


def _line(text: Any) -> str:
    """One line that Markdown shows as it is."""
    plain = " ".join(str(text).split())
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in plain)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """A table in Markdown, line by line."""
    lines = ["| " + " | ".join(_line(cell) for cell in row) + " |" for row in [head, *rows]]
    return [lines[0], "|" + "---|" * len(head), *lines[1:]]


def _sizes(parts: Mapping[str, Mapping[str, Tensor]]) -> list[tuple[str, str]]:
    counts: dict[str, int] = {}
    for part, tensors in parts.items():
        for name, value in tensors.items():
            owner = name.partition(".")[0] if part == "tokenizer" else part
            if part != "statistics":
                counts[owner] = counts.get(owner, 0) + value.numel()
    rows = [(owner, f"{count:,}") for owner, count in counts.items()]
    return [*rows, ("sha256 of encoder and bottleneck", hexed(digest(parts["tokenizer"])))]


def _data(stack: Stack, fingerprint: str, released: bool) -> list[str]:
    node = stack.tokenizer.data or stack.config.get("data")
    if node is None:
        why = "The release's own (arXiv 2512.13687)." if released else "None is recorded."
        return [why]
    said = ", ".join(f"{key} {value}" for key, value in masked(dict(node)).items())
    return [_line(said) + ".", *([f"Fingerprint {_line(fingerprint)}."] if fingerprint else [])]


def _numbers(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The last reading of every probe and split."""
    last = {(row.get("probe"), row.get("split")): row for row in rows}
    if not last:
        return ["None was measured: `vtp eval` measures them."]
    cells = [[row.get(key, "") for key in ("probe", "split", "value", "n", "step", "protocol")]
             for row in last.values()]  # fmt: skip
    return table(("probe", "split", "value", "n", "step", "protocol"), cells)

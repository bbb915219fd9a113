"""``vtp plan`` and ``vtp show`` as pages of text."""

from __future__ import annotations

import inspect
import io
import re
import types
import typing
from collections.abc import Hashable, Mapping, Set
from typing import Any, cast

from rich.console import Console
from rich.table import Table

from vtp_core.components import dial_options, schema_of
from vtp_core.costs import Costs, cost
from vtp_core.dryrun.page import size
from vtp_core.layout import Layout
from vtp_core.stack import Stack
from vtp_plugins.protocols import Dataset
from vtp_plugins.registry import Entry

_ARGUMENT = re.compile(r"^    (\w+): ", re.MULTILINE)  # as a docstring's Args names one


class PlanPage:
    """A counted plan, for people (``str``) and for programs (``data``)."""

    def __init__(self, stack: Stack, costs: Costs, layout: Layout) -> None:
        self.stack, self.costs, self.layout = stack, costs, layout

    @property
    def data(self) -> Any:
        return _data(self.costs, self.layout)

    def __str__(self) -> str:
        return text_of(_forwards(self.costs), _stages(self.costs), _sums(self.costs, self.layout))


def plan(stack: Stack, world: int = 1, dataset: Dataset | None = None) -> PlanPage:
    """Plan a stack's step for ``world`` processes; counts it on the meta device and reads no data.

    Of a generator's data the names of its labels are read, and the shape of the first latent.
    """
    return PlanPage(stack, *cost(stack, world, dataset))


def _forwards(costs: Costs) -> Table:
    table = Table(
        "forward",
        "rows x crops",
        "tokens",
        "outputs (rows)",
        "readers",
        "GFLOP",
        box=None,
        padding=(0, 2, 0, 0),
    )
    for node, c in costs.nodes.items():
        demand = costs.plan.demands[node]
        outputs = ", ".join(o if r == c.rows else f"{o} ({r})" for o, r in demand.rows.items())
        mark = "" if node in costs.plan.live else " - no gradient"
        readers = ", ".join(demand.readers)
        table.add_row(
            f"{node}{mark}",
            f"{c.rows} x {c.crops}",
            f"{c.tokens:,}",
            outputs,
            readers,
            f"{c.flops / 1e9:.2f}",
        )
    return table


def _stages(costs: Costs) -> Table:
    table = Table("stage", "forwards", "objectives", "saved for backward", box=None, padding=(0, 2, 0, 0))
    for index, (stage, kept) in enumerate(zip(costs.plan.stages, costs.stage_bytes(), strict=True)):
        table.add_row(str(index + 1), ", ".join(map(str, stage.nodes)), ", ".join(stage.readers), size(kept))
    return table


def _sums(costs: Costs, layout: Layout) -> str:
    encodes = sum(node.kind == "encode" for node in costs.nodes)
    shared = sum(c.flops for c in costs.nodes.values())
    saved = 1 - shared / costs.unshared if costs.unshared else 0.0
    parameters = ", ".join(f"{owner} {count / 1e6:.2f} M" for owner, count in costs.parameters.items())
    memory = costs.memory
    lines = [
        f"parameters     {sum(costs.parameters.values()) / 1e6:.2f} M train ({parameters}); "
        f"EMA teacher {costs.ema / 1e6:.2f} M",
        f"FLOPs          {costs.step_flops / 1e9:.1f} G a step{', of one process' if costs.world > 1 else ''}, "
        f"{costs.forward_flops / 1e9:.1f} G of them forward",
        f"memory         about {size(memory.together)}: {size(memory.lasting)} parameters, optimizer, teachers and "
        f"batch + {size(memory.peak)} in the step, {size(memory.saved)} of it kept for backward in the largest stage",
        f"synchronise    {_sent(costs)}",
        f"sharing        {encodes} encoder forwards instead of {costs.unshared_forwards}; "
        f"{saved:.0%} of the forward FLOPs of encoder, bottleneck and decoder saved",
        f"batch          {costs.announced[0] if costs.announced else f'{layout.batch_size} images a step'}",
        f"rows           {', '.join(f'{name} {count:,}' for name, count in layout.rows.items())}",
    ]
    lines += [f"weights        {line}" for line in costs.announced[1:]]
    lines += [f"captions       {_long(costs, *ids)}" for ids in dict.fromkeys(costs.captions.values())]
    lines += [f"left out       {name}: {reason}" for name, reason in costs.left_out.items()]
    if costs.bounded:
        lines.append(f"upper bound    {', '.join(costs.bounded)}: picks by value; all is counted as picked")
    return "\n".join(lines)


def _long(costs: Costs, ids: int, context: int) -> str:
    if costs.texts:
        return f"{ids} of {context} ids, as the longest of the first {costs.texts:,} of the data"
    return f"all {context} ids: the data does not tell them without its pictures"


def _sent(costs: Costs) -> str:
    if costs.world == 1:
        return f"{size(costs.memory.gradients)} of gradients a step, with more than one process"
    part = size(costs.sent_bytes("gradients", "shards"))
    return f"each process sends and receives {size(costs.sent_bytes())} a step, {part} of it for weights and gradients"


def _data(costs: Costs, layout: Layout) -> Mapping[str, Any]:
    """The plan as plain data."""
    memory = costs.memory
    return {
        "forwards": [
            {
                "forward": str(node), "rows": c.rows, "crops": c.crops, "tokens": c.tokens, "flops": c.flops,
                "saved_bytes": c.saved, "outputs": costs.plan.demands[node].rows,
                "readers": list(costs.plan.demands[node].readers), "gradient": node in costs.plan.live,
            }
            for node, c in costs.nodes.items()
        ],
        "stages": [
            {"forwards": [str(n) for n in s.nodes], "readers": list(s.readers), "saved_bytes": kept}
            for s, kept in zip(costs.plan.stages, costs.stage_bytes(), strict=True)
        ],
        "parameters": costs.parameters, "ema_parameters": costs.ema,
        "flops": {"forward": costs.forward_flops, "step": costs.step_flops, "unshared_forward": costs.unshared},
        "bytes": {"state": memory.lasting, "step": memory.peak, "largest_stage": memory.saved,
                  "sent": round(costs.sent_bytes())},
        "batch": {"images": layout.batch_size, "processes": layout.world, "micro_batches": layout.accumulate,
                  "rows": layout.batch_size // (layout.world * layout.accumulate), "rows_by_objective": layout.rows},
        "captions": {view: {"ids": ids, "context": context, "read": costs.texts}
                     for view, (ids, context) in costs.captions.items()},
        "announced": costs.announced, "left_out": costs.left_out, "upper_bound": costs.bounded,
    }  # fmt: skip


def text_of(*parts: Any) -> str:
    """Tables and lines, one under the other."""
    console = Console(file=io.StringIO(), width=160, color_system=None)
    for part in parts:
        console.print(part, markup=False, highlight=False, soft_wrap=True) if isinstance(
            part, str
        ) else console.print(part)
        console.print()
    file = console.file
    assert isinstance(file, io.StringIO)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()).strip() + "\n"


def show(entry: Entry, dial: str = "tiny") -> str:
    """One installed component: what it is, its options with defaults, what it reads."""
    loaded = entry.load()
    lines = [f"{entry.kind} {entry.name}   {entry.target}   {entry.distribution}", ""]
    if not inspect.isclass(loaded):
        told = getattr(loaded, "convert", loaded)  # of an importer: what it makes, and of what options
        lines += [inspect.getdoc(told) or "(no docstring)", ""]
    else:
        schema, modules = schema_of(cast("Hashable", loaded))
        lines += [documentation(loaded, {*schema.model_fields, *modules}), ""]
        defaults = dial_options(loaded, dial)
        lines.append("options:")
        for name, field in schema.model_fields.items():
            default = (
                "required"
                if field.is_required() and name not in defaults
                else defaults.get(name, field.default)
            )
            lines.append(
                f"  {name}: {_kind(field.annotation)} = {default!r}"
                if default != "required"
                else f"  {name} (required)"
            )
        lines += [f"  {name}: name of an entry under 'modules'" for name in modules]
        lines += _needs(loaded)
        lines += ["", f"source: {inspect.getsourcefile(loaded)}"]
    return "\n".join(lines)


def documentation(cls: type, options: Set[str]) -> str:
    """A class's docstring and, of its bases', those that explain options that it leaves to them."""
    texts = [inspect.getdoc(cls) or "(no docstring)"]
    for base in cls.__mro__[1:]:
        missing = options - set(_ARGUMENT.findall("\n".join(texts)))
        text = inspect.cleandoc(vars(base).get("__doc__") or "")
        if missing & set(_ARGUMENT.findall(text)):
            texts.append(text)
    return "\n\n".join(texts)


def _kind(annotation: Any) -> str:
    """A type as people write it; what pydantic checks beside it is told by the message of a refusal."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _kind(parts[0])
    if origin in {typing.Union, types.UnionType}:
        return " | ".join(map(_kind, parts))
    if origin is typing.Literal:
        return " | ".join(map(repr, parts))
    if inspect.isclass(origin):
        return f"{origin.__name__}[{', '.join('...' if part is ... else _kind(part) for part in parts)}]"
    if annotation is type(None):
        return "None"
    return annotation.__name__ if inspect.isclass(annotation) else str(annotation).replace("typing.", "")


def _needs(cls: Any) -> list[str]:
    """What an objective reads when built with defaults on a small image tokenizer."""
    from vtp_plugins.objective import Objective
    from vtp_plugins.spec import Spec

    if not issubclass(cls, Objective):
        return []
    import torch

    try:
        with torch.device("meta"):
            built = cls(Spec(width=64, depth=4, channels=16), **dial_options(cls, "tiny"))
    except (TypeError, ValueError, LookupError) as error:
        return ["", f"reads: depends on its options ({error})"]
    lines = ["", "reads:"]
    for slot, need in built.needs.items():
        source = "" if need.source == "student" else f" of {need.source}"
        lines.append(
            f"  {slot}: {', '.join(sorted(need.want))}{source}, view {need.view!r}, mask {need.mask!r}"
        )
    return lines

"""The tokenizer as people use it: images to latents and back, features, and what objectives export."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vtp_core.build import Model, blueprint
from vtp_core.errors import DataFault, StackFault
from vtp_core.export.diffusers_reading import read_autoencoder
from vtp_core.export.foreign_config import is_autoencoder
from vtp_core.export.native import is_native, read_native
from vtp_core.exporters import exporters_of
from vtp_core.official.config import is_official
from vtp_core.official.hub import is_id, located
from vtp_core.official.reading import read_official
from vtp_core.run.checkpoint import latest, load
from vtp_core.run.directory import RunDirectory
from vtp_core.stack import Stack, check_stack, load_run_stack
from vtp_core.state import loaded_tokenizer
from vtp_plugins.registry import Registry

if TYPE_CHECKING:
    from vtp_plugins.objective import Objective


@dataclass(frozen=True, slots=True)
class Features:
    """Full-width features.

    Attributes:
        cls: (B, D).
        patches: (B, N, D).
        grid: tokens along each axis.
    """

    cls: Tensor
    patches: Tensor
    grid: tuple[int, ...]


Exporter = Callable[[], Mapping[str, "Objective"]]


class Tokenizer(nn.Module):
    """Encoder, bottleneck and decoder with the conventions of public surfaces.

    Images are (B, 3, H, W) float in [0, 1]; latents are raw (B, C, h, w) unless ``standardized``.

    Args:
        model: the modules.
        exporters: the stack's objectives by name, or a function that builds them when first asked.
    """

    encoder: Any  # modules of the stack, called as vtp_plugins.protocols says
    bottleneck: Any
    decoder: Any

    def __init__(self, model: Model, exporters: Mapping[str, Objective] | Exporter | None = None) -> None:
        super().__init__()
        self.model = model
        self.stack: Stack = model.stack
        self.spec, self.modality = model.spec, model.modality
        for name, module in model.tokenizer_modules().items():
            self.add_module(name, module)
        self._exporters = exporters or {}

    @classmethod
    def from_pretrained(
        cls, path: str | Path, weights: str = "student", device: str = "cpu", overrides: Sequence[str] = (),
        registry: Registry | None = None,
    ) -> Tokenizer:  # fmt: skip
        """Load a tokenizer from a run, an export or an official VTP directory.

        Args:
            path: the directory; or the id of a VTP model on the Hugging Face hub, the one thing that is fetched
                when it is named (``VTP_OFFLINE=1`` forbids it).
            weights: ``student``, or ``ema`` where the run kept an EMA teacher.
            device: where to put it.
            overrides: of its stack, such as ``encoder.rope_dtype=float32``, which the release rounds to bfloat16.
            registry: what its names mean; by default what is installed. ``Registry([file])`` knows single files.

        Raises:
            DataFault: nothing loadable is there.
            StackFault: the weights do not fit the stack, or the run has no EMA teacher.
        """
        stack, parts = read_run(located(path) if is_id(path) else Path(path), overrides, registry)
        model = loaded_tokenizer(blueprint(bare(stack)), chosen(parts, weights))
        model.statistics = dict(parts.get("statistics", {}))
        kept = {name: part for name, part in parts.items() if name.startswith(("objectives/", "exports/"))}
        tokenizer = cls(model, lambda: exporters_of(stack, kept, device))
        tokenizer.stack = stack
        return tokenizer.to(device).eval().requires_grad_(False)

    @property
    def statistics(self) -> dict[str, Tensor]:
        """``mean`` and ``std`` of the latent, (C,) or (C, h, w), and what they are of; empty before a run's end."""
        return self.model.statistics

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def _signal(self, images: Tensor) -> Tensor:
        normalised: Tensor = self.modality.normalise(images.to(self.device))
        return normalised

    def encode(self, images: Tensor, standardized: bool = False) -> Tensor:
        """Images to latents (B, C, h, w)."""
        x = self._signal(images)
        tokens = self.encoder(x, want={"patches": len(x)})["patches"]
        latent = self.bottleneck(tokens)["carried"]  # (B, N, D) -> (B, N, C)
        z = latent.transpose(1, 2).unflatten(2, self._grid(x))  # (B, N, C) -> (B, C, h, w)
        return self._shifted(z, forward=True) if standardized else z

    def decode(self, z: Tensor, standardized: bool = False) -> Tensor:
        """Latents to images in display range, (B, 3, H, W), not clamped."""
        if not hasattr(self, "decoder"):
            raise StackFault("this tokenizer has no decoder; its stack trains none")
        z = self._shifted(z.to(self.device), forward=False) if standardized else z.to(self.device)
        shown: Tensor = self.modality.to_display(self.decoder(z)["decoded"])
        return shown

    def _shifted(self, z: Tensor, forward: bool) -> Tensor:
        if not self.statistics:
            raise DataFault(
                "the tokenizer has no latent statistics yet; its run's end computes them (vtp resume RUN)\n"
                "where there is no run: vtp latents DIR data.use=... -o LATENTS, and then\n"
                "vtp export DIR --format native --statistics LATENTS -o OUT puts them beside the weights"
            )
        return self.model.standardise(z) if forward else self.model.restore(z)

    def _grid(self, x: Tensor) -> tuple[int, ...]:
        return tuple(s // p for s, p in zip(x.shape[2:], self.spec.patch, strict=True))

    def features(self, images: Tensor) -> Features:
        """Full-width features after the final norm."""
        x = self._signal(images)
        found = self.encoder(x, want={"cls": len(x), "patches": len(x)})
        return Features(found["cls"], found["patches"], self._grid(x))

    def intermediate(
        self, images: Tensor, n: int | Sequence[int] = 1, norm: bool = True
    ) -> tuple[Features, ...]:
        """Full-width features after several blocks, in their order.

        Args:
            images: (B, 3, H, W).
            n: the last n blocks, or numbers of blocks counted from 0.
            norm: apply the encoder's final norm to each.

        Raises:
            ValueError: there is no such block.
        """
        x, depth = self._signal(images), self.spec.depth
        blocks = list(range(depth - n, depth)) if isinstance(n, int) else sorted(n)
        if not blocks or blocks[0] < 0 or blocks[-1] >= depth:
            raise ValueError(f"n: {n!r} names no blocks of an encoder of {depth}")
        names = [(f"hidden.cls:{block + 1}", f"hidden:{block + 1}") for block in blocks]
        found = self.encoder(x, want={name: len(x) for pair in names for name in pair})
        last = self.encoder.norm if norm else torch.nn.Identity()
        return tuple(Features(last(found[cls]), last(found[hidden]), self._grid(x)) for cls, hidden in names)

    def embed_image(self, images: Tensor) -> Tensor:
        """Images to L2-normalised embeddings (B, E), by the objective that exports ``embed_image``."""
        x = self._signal(images)
        found = self.encoder(x, want={"cls": len(x), "patches": len(x)})
        latent = self.bottleneck(found["patches"])["latent"]
        latent_cls = self.bottleneck(found["cls"][:, None])["latent"][:, 0]
        given = {**found, "latent": latent, "latent.cls": latent_cls}
        embedded: Tensor = self._exporter("embed_image").embed_image(given)
        return embedded

    def embed_text(self, texts: Sequence[str] | Tensor) -> Tensor:
        """Texts, or ids (n, L) of their tokens, to L2-normalised embeddings (n, E).

        By the objective that exports ``embed_text``, and ``embed_ids`` for ids.
        """
        if isinstance(texts, Tensor):
            known: Tensor = self._exporter("embed_ids").embed_ids(texts)
            return known
        embedded: Tensor = self._exporter("embed_text").embed_text(list(texts))
        return embedded

    def exports(self, name: str) -> bool:
        """Whether some objective of the stack exports ``name``."""
        try:
            self._exporter(name)
        except LookupError:
            return False
        return True

    def _exporter(self, name: str) -> Any:
        if callable(self._exporters):
            self._exporters = self._exporters()
        for objective in self._exporters.values():
            if name in objective.exports:
                return objective
        nodes = {**self.stack.tokenizer.exports, **self.stack.section("objectives")}
        missing = [n for n in nodes if n not in self._exporters]
        hint = (
            f"install the plugins of {', '.join(missing)}" if missing else "its stack has no such objective"
        )
        raise LookupError(f"this tokenizer has no {name}; {hint}")


def read_run(
    path: Path, overrides: Sequence[str] = (), registry: Registry | None = None
) -> tuple[Stack, dict[str, dict[str, Tensor]]]:
    """Stack and newest valid checkpoint of a run directory, or of an export or an official VTP directory."""
    stack = load_run_stack(path, registry or Registry(), overrides, check=False)
    if is_autoencoder(path):
        return stack, read_autoencoder(path, stack)
    if is_official(path):
        return stack, read_official(path)[1]
    if is_native(path):
        return stack, read_native(path)
    checkpoint = latest(path / "checkpoints")
    if checkpoint is None:
        fault = str(RunDirectory(path).record().get("fault") or "").partition("\n")[0]
        why = f": it failed: {fault}" if fault else f"; run vtp resume {path}"
        raise DataFault(f"{path} has no valid checkpoint yet{why}")
    parts, _ = load(checkpoint, verify=False)  # latest() has hashed it
    return stack, parts


def bare(stack: Stack) -> Stack:
    """The stack without what a tokenizer can do without; only these names must be installed."""
    wanted = {"modality", "size", "encoder", "bottleneck", "decoder"}
    kept = {k: v for k, v in stack.config.items() if k in wanted}
    kept["size"] = stack.tokenizer.size or stack.dial
    return check_stack(stack.name, kept, stack.registry)


def chosen(parts: Mapping[str, Mapping[str, Tensor]], weights: str) -> dict[str, Tensor]:
    """Tokenizer tensors, with the EMA teacher's in place of the student's where asked."""
    if weights not in {"student", "ema"}:
        raise StackFault(f"weights is 'student' or 'ema', not {weights!r}")
    tensors = dict(parts["tokenizer"])
    if weights == "ema":
        teacher, own = parts.get("teacher", {}), ("encoder.", "bottleneck.")
        averaged = {k: v for k, v in teacher.items() if k.startswith(own)}
        if not averaged:
            raise StackFault("this run kept no EMA teacher; use weights='student'")
        tensors |= averaged
    return tensors

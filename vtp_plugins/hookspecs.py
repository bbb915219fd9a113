"""Events of a run: three hooks around computation, three notices, one at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from torch import Tensor

    from vtp_plugins.clock import Clock
    from vtp_plugins.registry import Registry

hookspec = pluggy.HookspecMarker("vtp")
hookimpl = pluggy.HookimplMarker("vtp")

Call = Callable[..., Any]


class Hooks:
    """The specification; a hook plugin implements any subset with ``@hookimpl`` and is named under ``hooks:``."""

    @hookspec(firstresult=True)
    def vtp_encode(self, call: Call, x: Tensor) -> Mapping[str, Tensor] | None:
        """Run ``call(x)``, the encoder forward of one view; replace it, or wrap it with ``wrapper=True``."""

    @hookspec(firstresult=True)
    def vtp_decode(self, call: Call, z: Tensor) -> Mapping[str, Tensor] | None:
        """Run ``call(z)``, the decoder forward of latents (B, C, *grid)."""

    @hookspec(firstresult=True)
    def vtp_sample(self, call: Call, shape: tuple[int, ...]) -> Tensor | None:
        """Run ``call(shape)``, which samples latents of that shape."""

    @hookspec
    def vtp_build(self, engine: Any) -> None:
        """After construction, before optimizers: freeze, compile, add a probe."""

    @hookspec
    def vtp_step_end(self, engine: Any, clock: Clock, metrics: Mapping[str, float]) -> None:
        """After every step, with the row that goes into metrics.jsonl."""

    @hookspec
    def vtp_probe(self, engine: Any, step: int, readings: Sequence[Any]) -> None:
        """After probes ran at ``step``."""

    @hookspec
    def vtp_finish(self, run: Path, registry: Registry) -> Path | None:
        """The run directory is complete; a page written about it is returned as its path."""

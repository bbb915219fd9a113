"""Pictures out of a generator for the page: with and without guidance from the same noise, each made once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vtp_report.asked import Asked

if TYPE_CHECKING:
    from torch import Tensor

    from vtp_report.record import Record

ROWS = 16  # samples of one pass


class Draws:
    """Samples of every condition from the same few noises.

    Args:
        plain: a ``vtp_core.generation.Generator`` without guidance.
        guided: the same with it; None where the stack's sampler has none.
        conditions: one a row.
        count: noises; sample i of every row begins at noise i of the seed. Without a condition each row has
            its own.
        seed: of the noise.
    """

    def __init__(
        self, plain: Any, guided: Any | None, conditions: Sequence[Asked], count: int, seed: int
    ) -> None:
        self.plain, self.guided = plain, guided
        self.conditions, self.count, self.seed = list(conditions), count, seed
        self._made: dict[str, Tensor] = {}

    @property
    def best(self) -> Any:
        """The generator as the stack samples from it."""
        return self.guided or self.plain

    def samples(self, guided: bool) -> Tensor:
        """Pictures (rows, count, ch, H, W) in [0, 1] on the CPU."""
        generator, key = (self.guided, "guided") if guided else (self.plain, "plain")
        if key not in self._made:
            rows = len(self.conditions)
            values = [one.value for one in self.conditions for _ in range(self.count)]
            made = pictures(generator, self.noise(rows), embedded(generator, values))
            self._made[key] = made.unflatten(0, (rows, self.count))
        return self._made[key]

    def noise(self, rows: int) -> Tensor:
        """Initial noise of so many rows, (rows * count, C, h, w)."""
        from vtp_core.generation import noise_of

        alone = self.conditions[0].value is None
        noise: Tensor = noise_of(self.plain, self.count * (rows if alone else 1), self.seed)
        return noise if alone else noise.repeat(rows, *[1] * (noise.ndim - 1))


def opened(record: Record) -> tuple[Any, Any | None]:
    """The generator of a run without guidance, and with it where its stack says so."""
    from vtp_core.generation import Generator

    def read(*overrides: str) -> Any:
        return Generator.from_pretrained(record.run, overrides=overrides, registry=record.registry)

    return (read("sampler.guidance=null"), read()) if record.stage.guided else (read(), None)


def embedded(generator: Any, values: Sequence[int | str | None]) -> Tensor | None:
    """Conditions as the network takes them: labels (n,), or embeddings (n, E) of captions, each embedded once."""
    kind, of = generator.spec.condition, generator.conditions.of
    if kind == "label":
        return of(len(values), list(values), None, 0)  # type: ignore[no-any-return]
    if kind == "embedding":
        texts = list(dict.fromkeys(values))
        table = of(len(texts), None, texts, 0)  # (distinct, E)
        return table[[texts.index(value) for value in values]]  # type: ignore[no-any-return]
    return None


def pictures(generator: Any, noise: Tensor, condition: Tensor | None) -> Tensor:
    """Noise (n, C, h, w) to pictures (n, ch, H, W)."""
    import torch

    conditions = [None] * len(noise.split(ROWS)) if condition is None else condition.split(ROWS)
    parts = zip(noise.split(ROWS), conditions, strict=True)
    return torch.cat([generator.from_noise(part, given) for part, given in parts])

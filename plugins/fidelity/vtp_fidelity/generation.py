"""The probe ``generation``: what a generator samples against real images, with yardsticks beside it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from vtp_core.errors import DataFault
from vtp_core.probes import LeftOut, up_to
from vtp_fidelity.conditions import Conditions, Labels, conditions
from vtp_fidelity.frechet import frechet_distance
from vtp_fidelity.networks import METRICS, Extracted, Features, Layer, Metric, Network, extracted, network
from vtp_fidelity.pixels import Rounding, to_bytes
from vtp_fidelity.reconstructed import halves
from vtp_fidelity.values import values
from vtp_plugins import Reading, Spec

if TYPE_CHECKING:
    from vtp_plugins.protocols import Bench

Beside = Literal["floor", "reconstructions", "noise"]
CHUNK = 1024  # samples in memory at once


class Generation:
    """FD, KID, Inception Score, precision and recall of samples; of lite0 features, or Inception's.

    Beside the Fréchet distance stand the floor (two halves of the real images), that of the
    reconstructions of the same images, which the tokenizer alone answers for, and that of decoded
    noise, which no generator should reach.

    Args:
        spec: of the tokenizer.
        n: samples, and real images; fewer where the split is smaller.
        split: whose images; without it the one that is trained on.
        labels: ``balanced``, ``random``, or ``data``, those of random samples of the split; without it
            balanced. A generator of captions takes those of random samples.
        features: ``lite0``, named fd_lite0 and so on; or ``inception``, whose numbers are FID, KID, IS.
        layer: of lite0: ``block10`` (112-d, for hundreds) or ``pool`` (1280-d, for tens of thousands).
        size: short side that lite0 sees; without it the stack's, 96 at least.
        seed: of noise, of random labels and of the floor's halves.
        rounding: how floats become bytes: ``round``, ``truncate`` (REPA, RAE) or ``adm``.
        metrics: of ``fd``, ``kid``, ``is``, ``pr`` (precision and recall).
        beside: yardsticks of ``fd``.
        batch_size: samples drawn at once.
    """

    subject = "generator"
    fields = frozenset({"image"})

    def __init__(
        self,
        spec: Spec,
        *,
        n: Annotated[int, Field(ge=2)] = 500,
        split: str | None = None,
        labels: Labels | None = None,
        features: Features = "lite0",
        layer: Layer | None = None,
        size: Annotated[int, Field(ge=32)] | None = None,
        seed: int = 0,
        rounding: Rounding = "round",
        metrics: tuple[Metric, ...] = METRICS,
        beside: tuple[Beside, ...] = ("floor", "reconstructions", "noise"),
        batch_size: Annotated[int, Field(gt=0)] = 64,
    ) -> None:
        if spec.modality != "image":
            raise ValueError(f"probes.generation measures images; the stack's modality is {spec.modality}")
        if layer and features != "lite0":
            raise ValueError(f"probes.generation: layer is lite0's; {features} has one layer, leave it out")
        self.n, self.split, self.labels, self.seed = n, split, labels, seed
        self.features, self.layer, self.size = features, layer, size or max(96, min(spec.size))
        self.rounding, self.metrics, self.beside, self.batch = rounding, metrics, beside, batch_size
        self.notes: list[str] = []
        self._real: dict[tuple[str, str], Extracted] = {}  # real images stay; a run measures often

    @torch.no_grad()
    def __call__(self, generator: Any, bench: Bench) -> list[Reading]:
        self.notes = []
        split = self.split or bench.splits[0]
        if split not in bench.splits:
            raise LeftOut(f"the dataset has no split {split}; it has {', '.join(bench.splits)}")
        net = network(self.features, self.layer, self.size, bench.device)
        try:
            return self._measured(generator, bench, split, net)
        except ArithmeticError as error:
            raise LeftOut(str(error)) from error

    def _measured(self, generator: Any, bench: Bench, split: str, net: Network) -> list[Reading]:
        dataset = bench.dataset(split)
        reference = dataset.fingerprint()[:12]
        real = self._features_of_real(bench, net, split, reference)
        n = len(real)
        if n < self.n:
            self.notes.append(f"{n} samples, since {split} has no more images")
        asked = conditions(generator, dataset, split, n, self.labels, self.seed)
        fake = extracted(net, self._samples(generator, asked, n), logits="is" in self.metrics)
        data = f"images of {split}, reference {reference}"
        pixels = f"{'x'.join(map(str, self._sides))} px, uint8 {self.rounding}"
        how = f"{n} samples against {n} {data} | {asked.words} | {generator.protocol} | seed {self.seed} | {pixels}"
        out = []
        for metric in self.metrics:
            try:
                found = values(net, (metric,), fake, real)
            except ArithmeticError as error:
                self.notes.append(f"{metric} left out: {error}")
                continue
            out += [Reading(f"generation/{v.name}", split, v.value, n, f"{how} | {v.how}") for v in found]
            if metric == "fd":
                out += self._yardsticks(
                    generator, bench, net, split, real, f"{data} | {pixels} | {found[0].how}"
                )
        return out

    def _features_of_real(self, bench: Bench, net: Network, split: str, reference: str) -> Extracted:
        if (split, reference) not in self._real:
            batches = (to_bytes(x) for (x,) in up_to(self.n, ((x,) for x in bench.images(split))))
            self._real[split, reference] = extracted(net, self._noting(batches))
        return self._real[split, reference]

    def _noting(self, batches: Iterator[Tensor]) -> Iterator[Tensor]:
        for images in batches:
            self._sides = tuple(images.shape[2:])
            yield images

    def _samples(self, generator: Any, asked: Conditions, n: int) -> Iterator[Tensor]:
        """Bytes of n samples."""
        for start in range(0, n, CHUNK):
            stop = min(start + CHUNK, n)
            given = asked.part(start, stop)
            images = generator.sample(stop - start, **given, seed=self.seed, batch=self.batch, first=start)
            yield from to_bytes(images, self.rounding).split(self.batch)

    def _yardsticks(
        self, generator: Any, bench: Bench, net: Network, split: str, real: Extracted, how: str
    ) -> list[Reading]:
        n, name, out = len(real), f"generation/{net.names['fd']}", []
        if "floor" in self.beside:
            words = f"two halves of {n} {how} | seed {self.seed}"
            out.append(Reading(f"{name}/floor", split, halves(real.points, self.seed), n // 2, words))
        if "reconstructions" in self.beside:
            pairs = up_to(n, bench.reconstructions(split))
            fake = extracted(net, (to_bytes(y, self.rounding) for _, y in pairs))
            value, words = (
                frechet_distance(fake.points, real.points),
                f"reconstructions against their {n} {how}",
            )
            out.append(Reading(f"{name}/reconstructions", split, value, n, words))
        if "noise" in self.beside:
            words = f"{n} decodes of standard normal latents against {n} {how} | seed {self.seed}"
            try:
                fake = extracted(net, self._noise(generator.tokenizer, n))
            except DataFault as error:  # a tokenizer in training has no statistics yet
                self.notes.append(f"noise left out: {error}")
            else:
                out.append(
                    Reading(f"{name}/noise", split, frechet_distance(fake.points, real.points), n, words)
                )
        return out

    def _noise(self, tokenizer: Any, n: int) -> Iterator[Tensor]:
        draw, shape = (
            torch.Generator().manual_seed(self.seed),
            (tokenizer.spec.channels, *tokenizer.spec.grid),
        )
        for start in range(0, n, self.batch):
            z = torch.randn(min(self.batch, n - start), *shape, generator=draw)
            yield to_bytes(tokenizer.decode(z, standardized=True), self.rounding)

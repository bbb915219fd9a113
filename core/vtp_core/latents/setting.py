"""What latents are written with: a run's tokenizer beside its data, and perhaps a teacher."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from vtp_core import options
from vtp_core.components import resolve
from vtp_core.errors import DataFault, StackFault, suggestion
from vtp_core.evaluation import dataset_component, dataset_factory
from vtp_core.latents.encoding import POSTERIORS, Encoding, TeacherOutput
from vtp_core.latents.manifest import STATISTICS
from vtp_core.probes.bench import Bench, centre
from vtp_core.stack import Stack, load_run_stack
from vtp_core.statistics import check, digest, latent_statistics
from vtp_core.tokenizer import Tokenizer
from vtp_plugins.registry import Registry
from vtp_plugins.spec import Spec

if TYPE_CHECKING:
    from vtp_plugins.protocols import Dataset, View

SECTIONS = ("data", "teachers")


@dataclass(frozen=True, slots=True)
class Setting:
    """A tokenizer beside one split of its data.

    Attributes:
        tokenizer: in eval mode, on its device.
        stack: the run's, with overrides.
        make: split name to dataset.
        dataset: of the split that is written.
        view: raw signal to what is encoded.
        split: name of it.
    """

    tokenizer: Tokenizer
    stack: Stack
    make: Callable[[str | None], Dataset]
    dataset: Dataset
    view: View
    split: str
    weights: str

    @property
    def spec(self) -> Spec:
        return self.tokenizer.spec

    @property
    def workers(self) -> int:
        return self.stack.data.workers

    @property
    def max_bad_fraction(self) -> float:
        return self.stack.data.max_bad_fraction

    @property
    def numbers(self) -> list[str]:
        """Integer fields that samples have: those with names behind them, and ``label``."""
        return sorted(self.dataset.fields & {"label", *self.dataset.names})

    @property
    def texts(self) -> bool:
        """Whether texts can be embedded and there are some."""
        return "text" in self.dataset.fields and self.tokenizer.exports("embed_text")

    @property
    def data_hash(self) -> str:
        """Of the samples and of the options that they are read with."""
        component = dataset_component(self.stack)
        read = json.dumps([component.name, component.options], sort_keys=True, default=str)
        return hashlib.sha256(f"{read}\0{self.dataset.fingerprint()}".encode()).hexdigest()

    def teacher(self, asked: str | None) -> TeacherOutput | None:
        """An output of an entry of the stack's ``teachers``, as ``NAME`` or ``NAME/OUTPUT``."""
        if asked is None:
            return None
        name, _, output = asked.partition("/")
        nodes = self.stack.section("teachers")
        if name not in nodes:
            remedy = f"; teachers.{name}={{use: ...}} adds one" if not nodes else suggestion(name, nodes)
            raise StackFault(f"teacher: no {name!r} under 'teachers' of the run's stack{remedy}")
        component = resolve(
            self.stack.registry, "teachers", f"teachers.{name}", nodes[name], self.stack.dial,
            taken=options.COMPONENT_KEYS - {"use"},
        )  # fmt: skip
        module = component.build(self.spec).requires_grad_(False).eval().to(self.tokenizer.device)
        return TeacherOutput(name, output or "patches", module)

    def statistics(self) -> dict[str, Tensor]:
        """The tokenizer's own; computed over the trained split where it has none, or where its are the student's."""
        found = self.tokenizer.statistics
        if not found or self.weights == "ema":
            return latent_statistics(self.tokenizer, Bench(self.tokenizer, self.make))
        return {**found, "of": digest(self.tokenizer.state_dict())}


def prepared(
    run: Path, overrides: Sequence[str], split: str | None, weights: str, device: str, registry: Registry
) -> Setting:
    """Load the tokenizer of a run and the split of its data.

    Raises:
        DataFault: there is no run, its statistics are another tokenizer's, or the data has no signals.
        StackFault: an override of something that latents don't depend on, or an unknown split.
    """
    for override in overrides:
        section = re.split(r"[.=]", override.lstrip("~+"), maxsplit=1)[0]
        if section not in SECTIONS:
            raise StackFault(
                f"{override}: latents are written of data; only data... and teachers... apply here"
            )
    stack = load_run_stack(run, registry, overrides, check=False)
    tokenizer = Tokenizer.from_pretrained(run, weights=weights, device=device, registry=registry)
    if tokenizer.statistics and weights == "student":
        check(
            tokenizer.statistics, tokenizer.state_dict(), f"{run}: its latent statistics", f"vtp resume {run}"
        )
    make = dataset_factory(stack, tokenizer.spec)
    dataset = make(split)
    view = centre(tokenizer.spec)
    if view.field not in dataset.fields:
        held = ", ".join(sorted(dataset.fields))
        raise DataFault(f"data: the dataset has no {view.field!r} to encode, its samples hold {held}")
    return Setting(tokenizer, stack, make, dataset, view, split or dataset.splits[0], weights)


def check_layout(layout: str, encoding: Encoding, shard_size: int) -> None:
    """Options that exclude each other."""
    if layout not in STATISTICS:
        raise StackFault(f"layout: no {layout!r}{suggestion(layout, STATISTICS)}")
    if encoding.posterior not in POSTERIORS:
        raise StackFault(f"posterior: no {encoding.posterior!r}{suggestion(encoding.posterior, POSTERIORS)}")
    if shard_size < 1:
        raise StackFault(f"shard_size: a shard holds one sample at least, not {shard_size}")
    if encoding.flip and len(encoding.tokenizer.spec.size) != 2:
        raise StackFault("flip: only images have a mirror image; --no-flip leaves it out")
    beside = encoding.images or encoding.teacher is not None or encoding.posterior == "moments"
    if layout == "lightningdit" and (beside or not encoding.flip):
        raise StackFault(
            "layout lightningdit holds latents, latents_flip and labels alone; leave out --images, --teacher, "
            "--posterior moments and --no-flip, or take --layout vtp"
        )

"""The engine's own keys of a stack, typed: everything that is not an option of a component."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

_SHARE = re.compile(r"(\d+(?:\.\d*)?)%")


def _step(value: Any) -> int | str:
    if isinstance(value, str):
        share = _SHARE.fullmatch(value)
        if share is not None and float(share[1]) <= 100:
            return value
    elif type(value) in {int, float} and value >= 0 and float(value).is_integer():
        return int(value)
    raise ValueError('a step is a number of steps, or a share of the run such as "37.5%"')


def _not_built(value: bool) -> bool:
    if value:
        raise ValueError("not built yet; leave it out")
    return value


Step = Annotated[int | str, BeforeValidator(_step)]
Share = Annotated[float, Field(ge=0, le=1)]
Momentum = Annotated[float, Field(ge=0, lt=1)]


def steps_of(value: Step, steps: int) -> int:
    """A step key in steps: shares are of the run's ``steps``."""
    if isinstance(value, int):
        return value
    return round(float(value[:-1]) / 100 * steps)


class _Keys(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True)


class Optim(_Keys):
    """``optim``: of ``train``, or of one component, where a written key wins.

    The learning rate warms up linearly over ``warmup`` steps and then follows ``schedule`` to
    ``final`` times its peak. Weight decay spares vectors: norms, biases, tokens, scales.
    """

    use: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: float = Field(1e-3, gt=0)
    betas: tuple[Momentum, Momentum] = (0.9, 0.98)
    eps: float = Field(1e-6, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    warmup: Step = "5%"
    schedule: Literal["cosine", "constant", "linear"] = "cosine"
    final: float = Field(0.0, ge=0, le=1)
    freeze: Step = 0


class CriticOptim(Optim):
    """``optim`` of a critic: the same keys with the defaults that adversarial training wants."""

    betas: tuple[Momentum, Momentum] = (0.5, 0.9)
    weight_decay: float = Field(0.0, ge=0)
    warmup: Step = 0
    schedule: Literal["cosine", "constant", "linear"] = "constant"


class Teacher(_Keys):
    """``train.teacher``: momentum of the EMA teacher, by cosine from its first value to its last."""

    momentum: tuple[Share, Share] = (0.992, 1.0)


class Train(_Keys):
    """``train``."""

    steps: int = Field(1000, gt=0)
    seed: int = Field(0, ge=0)
    device: str = "auto"
    precision: Literal["float32", "float64", "bfloat16"] = "float32"
    compile: Annotated[bool, AfterValidator(_not_built)] = False
    accumulate: int = Field(1, gt=0)
    parallel: Literal["replicated", "fsdp2"] = "replicated"
    activation_checkpointing: bool = False
    timeout: float = Field(600.0, gt=0)
    check_every: Step = 1000
    checkpoint_every: Step = "25%"
    keep: int = Field(2, gt=0)
    max_grad_norm: float | None = Field(3.0, gt=0)
    nonfinite: Literal["raise"] = "raise"
    teacher: Teacher = Teacher()
    optim: Optim = Optim()
    trackers: tuple[str, ...] = ()


class Balance(_Keys):
    """``balance``: the weight is multiplied by the ratio of two gradients' norms at an anchor."""

    against: str
    at: str = "decoder.last"
    max: float = Field(1e4, gt=0)
    eps: float = Field(1e-4, gt=0)


class Critic(_Keys):
    """``critic``: when the critic of an adversarial objective has its turn, and on what."""

    order: Literal["before", "after"] = "after"
    input: Literal["reuse", "fresh"] = "reuse"
    start: Step | None = None
    weight: float = 1.0
    optim: CriticOptim = CriticOptim()


class Objective(_Keys):
    """Keys of an objective that belong to the stack; ``weight`` may be given by term."""

    weight: float | dict[str, float] = 1.0
    rows: float = Field(1.0, gt=0, le=1)
    start: Step = 0
    stop: Step | None = None
    every: int = Field(1, gt=0)
    repeat: int = Field(1, gt=0)
    warmup: Step = 0
    balance: Balance | None = None
    critic: Critic = Critic()


class Data(_Keys):
    """Keys of ``data`` that belong to the loader; the dataset's own options stand beside them."""

    batch_size: int = Field(64, gt=0)
    workers: int = Field(1, ge=0)
    max_bad_fraction: float = Field(1e-3, ge=0, le=1)


class Run(_Keys):
    """``run``: where the run lives."""

    dir: str | None = None


class Probe(_Keys):
    """Keys of a probe that belong to the stack; without ``every`` it runs at the end only."""

    every: Step | None = None


class Tokenizer(_Keys):
    """``tokenizer``: the earlier run to start from, and modules that do not train.

    ``size``, ``exports`` and ``data`` are filled in from the earlier run's stack: the dial of its modules, its
    objectives that export something, and its data, which probes look at where a run's own has no signals.
    """

    from_: str | None = Field(None, alias="from")
    weights: Literal["student", "ema"] = "student"
    frozen: tuple[str, ...] = ()
    size: str | None = None
    exports: dict[str, dict[str, Any]] = {}
    data: dict[str, Any] | None = None


class Ema(_Keys):
    """``generator.ema``: the average that is sampled from; in its first steps it moves faster.

    With ``warmup`` the decay after t steps is at most (1 + t) / (10 + t): a plain average of 0.9999 is
    still the initial weights after a thousand steps (specs/generators.md 10).
    """

    decay: float = Field(0.9999, ge=0, lt=1)
    warmup: bool = True

    def at(self, step: int) -> float:
        """Decay of the update that follows ``step`` steps."""
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay


class Sampler(_Keys):
    """Keys of ``sampler`` that belong to the engine; the sampler's own options stand beside them.

    ``guidance`` and ``reuse`` have the keys of ``vtp_core.samplers.guidance.Guidance`` and
    ``vtp_core.samplers.reuse.Reuse``; ``weak`` is the run of the generator that ``guidance.use: auto`` needs.
    """

    guidance: dict[str, Any] | None = None
    reuse: dict[str, Any] | None = None
    weak: str | None = None


class Generator(_Keys):
    """Keys of ``generator`` that belong to the engine; the generator's own options stand beside them."""

    path: dict[str, Any] | None = None
    condition: str | None = None
    drop_condition: float = Field(0.0, ge=0, lt=1)
    ema: Ema | None = None
    share: str | None = None


COMPONENT_KEYS = frozenset({"use", "from", "frozen", "optim"})
OBJECTIVE_KEYS = frozenset(Objective.model_fields) | {"optim"}
DATA_KEYS = frozenset(Data.model_fields)
PROBE_KEYS = frozenset(Probe.model_fields)
GENERATOR_KEYS = frozenset(Generator.model_fields)
SAMPLER_KEYS = frozenset(Sampler.model_fields)

DIALS: dict[str, dict[str, Any]] = {
    "tiny": {"lr": 1e-3, "warmup": "5%"},
    "s": {"lr": 5e-4, "warmup": "3%"},
    "b": {"lr": 5e-4, "warmup": "3%"},
    "l": {"lr": 5e-4, "warmup": "3%"},
}
"""What ``size`` sets of ``train.optim``; widths and depths are each component's ``sizes``."""

"""The contract's test kit: every objective of this project passes ``check_objective(Mine)`` in a test."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vtp_plugins.comparisons import equal, generators, gradients, near, tensors
from vtp_plugins.declarations import check_declarations
from vtp_plugins.errors import PluginFault
from vtp_plugins.fakes import FakeBatch as FakeBatch
from vtp_plugins.fakes import FakeClock as FakeClock
from vtp_plugins.objective import AdversarialObjective, Objective
from vtp_plugins.spec import Spec
from vtp_plugins.splits import check_masks, check_splits

SPEC = Spec(
    size=(32, 32),
    patch=(8, 8),
    width=16,
    depth=4,
    channels=4,
    classes=3,
    generator_width=12,
    teachers=(("lite0", 6),),
)
"""A tiny image tokenizer: 32 pixels, 4 x 4 tokens of 16, latents of 4."""

ROWS = 8


def check_objective(cls: Callable[..., Objective], spec: Spec | None = None, **options: Any) -> None:
    """Hold an objective against the contract, on fake outputs of the needs that it declares.

    It is built, and must declare honestly what it reads and brings; its losses must be finite scalars in
    float32 at least, equal whenever the clock is, without a change of state, and with gradient; what settles
    must survive a save and a load; and losses, gradients and settled state of two and four processes, of
    micro-batches where it is not coupled, and of uneven masks, must be those of one process with the whole batch.

    Args:
        cls: the class, or anything that builds one from a spec and options.
        spec: shapes of the tokenizer; :data:`SPEC` by default.
        **options: of the class.

    Raises:
        PluginFault: the contract is broken; the message says where and what mends it.
    """
    _Check(cls, spec or SPEC, options).run()


class _Check:
    def __init__(self, cls: Callable[..., Objective], spec: Spec, options: Mapping[str, Any]) -> None:
        self.cls, self.spec, self.options = cls, spec, options
        self.name = getattr(cls, "__name__", type(cls).__name__)

    def fail(self, message: str) -> None:
        raise PluginFault(f"{self.name}: {message}")

    def run(self) -> None:
        self.objective = self.built(seed=0)
        check_declarations(self.objective, self.built(seed=1), self.fail)
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            self.losses_are_scalars(dtype)
        self.forward_is_pure()
        self.gradient_arrives()
        self.settles()
        self.adds_up()
        self.reloads()
        check_masks(FakeBatch(self.objective, self.spec, ROWS), self.fail)
        check_splits(lambda: self.copy(still=False), self.spec, ROWS, self.fail)
        if isinstance(self.objective, AdversarialObjective):
            self.criticises(self.objective)

    # ---- building

    def built(self, seed: int) -> Objective:
        """A fresh instance; the seed moves its initial weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            objective = self.cls(self.spec, **self.options)
        if not isinstance(objective, Objective):
            self.fail(f"is a {type(objective).__name__}; derive it from vtp_plugins.Objective")
        return objective

    def copy(self, dtype: torch.dtype = torch.float64, still: bool = True) -> Objective:
        """The objective with EMA copies bound and its critic still, as the engine keeps it."""
        objective = copy.deepcopy(self.objective).to(dtype)
        self.bind(objective)
        if still and isinstance(objective, AdversarialObjective):
            objective.critic.requires_grad_(False)
        return objective

    def bind(self, objective: Objective, source: Objective | None = None) -> None:
        twins = {name: copy.deepcopy(getattr(source or objective, name)) for name in objective.shadow}
        objective.bind_shadows({name: twin.requires_grad_(False).eval() for name, twin in twins.items()})

    # ---- losses

    def losses(self, objective: Objective, clock: FakeClock, batch: FakeBatch) -> dict[str, Tensor]:
        """Terms of one process, held against what forward promises."""
        try:
            terms = objective(batch.got(clock), clock)
        except KeyError as error:
            raise PluginFault(
                f"{self.name}: forward reads {error}, which self.needs does not name"
            ) from error
        return self.scalars(terms, "forward")

    def scalars(self, terms: Any, method: str) -> dict[str, Tensor]:
        if not isinstance(terms, dict) or not terms:
            self.fail(
                f"{method} returns {type(terms).__name__}; return a dict of scalars by term, one at least"
            )
        for term, value in terms.items():
            if not isinstance(value, Tensor) or value.ndim:
                self.fail(f"{method}'s term {term!r} is no scalar tensor; reduce it to shape ()")
            if not torch.isfinite(value):
                self.fail(f"{method}'s term {term!r} is {value.item()} on random outputs of scale 1")
        return dict(terms)

    def losses_are_scalars(self, dtype: torch.dtype) -> None:
        """In float32 at least, whatever comes in; float64 stays float64. All that is wanted is read."""
        low = dtype == torch.bfloat16
        wide = torch.float32 if low else dtype
        batch = FakeBatch(self.objective, self.spec, ROWS, dtype)
        objective = self.copy(wide)
        for step in (3, 97):  # some read more late in a run
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                terms = self.losses(objective, FakeClock(step), batch)
                if isinstance(objective, AdversarialObjective):
                    objective.critique(batch.got(FakeClock(step)), FakeClock(step))
            for term, value in terms.items():
                if value.dtype != wide:
                    self.fail(f"term {term!r} is {value.dtype} from {dtype} outputs; compute it in {wide}")
        for slot, need in objective.needs.items():
            for output in sorted(need.want):
                if (slot, output) not in batch.read:
                    self.fail(f"need {slot!r} wants {output!r}, which forward never reads; leave it out")

    def forward_is_pure(self) -> None:
        """Two calls with one clock agree, and change nothing but ``pending``."""
        objective = self.copy()
        batch, clock = FakeBatch(objective, self.spec, ROWS, torch.float64), FakeClock()
        before, drawn = tensors(objective), generators()
        first = self.losses(objective, clock, batch)
        if not equal(drawn, generators()):
            self.fail(
                "forward uses a global random generator; draw with clock.normal, clock.uniform or clock.rng"
            )
        for key, value in tensors(objective).items():
            if key not in before or not torch.equal(value, before[key]):
                self.fail(
                    f"forward changes {key!r}; put what changes in self.pending and merge it in settle()"
                )
        for key, value in objective.pending.items():
            if value.requires_grad:
                self.fail(f"pending[{key!r}] holds a graph; detach it")
        objective = self.copy()
        for term, value in self.losses(objective, clock, batch).items():
            if not torch.equal(value, first[term]):
                self.fail(
                    f"term {term!r} differs between two calls with one clock; draw from the clock alone"
                )

    def gradient_arrives(self) -> None:
        """At some parameter or at some output, finite."""
        objective = self.copy()
        batch = FakeBatch(objective, self.spec, ROWS, torch.float64)
        found = gradients([self.losses(objective, FakeClock(), batch)], [objective], batch.learning())
        for key, grad in found.items():
            if not torch.isfinite(grad).all():
                self.fail(f"the gradient of {key} is not finite on random outputs of scale 1")
        if not any(grad.abs().sum() > 0 for grad in found.values()):
            self.fail("no gradient reaches a parameter or an output of the student; is something detached?")

    # ---- state

    def settles(self) -> None:
        """``settle`` empties ``pending``."""
        objective, clock = self.copy(), FakeClock()
        self.losses(objective, clock, FakeBatch(objective, self.spec, ROWS, torch.float64))
        objective.settle(clock)
        if objective.pending:
            self.fail(
                f"settle leaves {sorted(objective.pending)} in pending; end it with super().settle(clock)"
            )

    def adds_up(self) -> None:
        """Micro-batches and repeats call forward several times before one ``settle``."""
        whole, halves = self.copy(), self.copy()
        batch = FakeBatch(whole, self.spec, ROWS, torch.float64)
        whole(batch.got(FakeClock()), FakeClock())
        if self.objective.coupled or not whole.pending:
            return
        for part in range(2):
            halves(batch.got(FakeClock(micro=part, micros=2)), FakeClock(micro=part, micros=2))
        whole.settle(FakeClock())
        halves.settle(FakeClock())
        for key, value in halves.state_dict().items():
            if not near(value, whole.state_dict()[key]):
                self.fail(
                    f"{key!r} settles differently over two micro-batches; add to pending, don't replace"
                )

    def reloads(self) -> None:
        """A state_dict holds all that matters: a reloaded objective gives the same losses."""
        objective = self.copy()
        batch = FakeBatch(objective, self.spec, ROWS, torch.float64)
        lost = {
            key: value.clone()
            for key, value in tensors(objective).items()
            if key not in objective.state_dict()
        }
        for step in range(2):
            self.losses(objective, FakeClock(step), batch)
            objective.settle(FakeClock(step))
        now = tensors(objective)
        for key, value in lost.items():
            if key in now and not torch.equal(value, now[key]):
                self.fail(
                    f"settle changes {key!r}, which state_dict() leaves out; register_buffer it, persistent"
                )
        other = self.built(seed=2).to(torch.float64)
        other.load_state_dict(objective.state_dict())
        other.bind_shadows(objective._shadows)
        again = self.losses(other, FakeClock(2), batch)
        for term, value in self.losses(objective, FakeClock(2), batch).items():
            if not torch.equal(value, again[term]):
                self.fail(
                    f"term {term!r} differs after state_dict() and load_state_dict(); register its state"
                )

    # ---- critics

    def criticises(self, objective: AdversarialObjective) -> None:
        """``critique`` trains the critic, and nothing else does."""
        if not isinstance(getattr(objective, "critic", None), nn.Module):
            self.fail("has no critic; set self.critic to the module that critique() trains")
        objective = copy.deepcopy(objective).double()
        self.bind(objective)
        batch = FakeBatch(objective, self.spec, ROWS, torch.float64)
        got = batch.got(FakeClock())
        for outputs in got.values():
            outputs.values = {
                k: v.detach() if isinstance(v, Tensor) else v for k, v in outputs.values.items()
            }
        before = tensors(objective)
        terms = self.scalars(objective.critique(got, FakeClock()), "critique")
        sum(terms.values(), torch.zeros((), dtype=torch.float64)).backward()
        if not any(p.grad is not None and p.grad.abs().sum() > 0 for p in objective.critic.parameters()):
            self.fail("critique gives its critic no gradient")
        if any(not torch.equal(value, before[key]) for key, value in tensors(objective).items()):
            self.fail("critique changes state; put what changes in self.pending")

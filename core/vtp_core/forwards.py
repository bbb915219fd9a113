"""Running a plan's nodes: each is computed once, on the fewest rows, and handed out as slices."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vtp_core.build import Model
from vtp_core.clock import StepClock
from vtp_core.errors import PluginFault, StackFault
from vtp_core.inputs import Inputs as Inputs
from vtp_core.inputs import Signals
from vtp_core.nodes import Handout, Node, Plan, Stage
from vtp_plugins.needs import Outputs


class Forwards:
    """Values of one micro-batch's nodes, computed when first read.

    Args:
        model: modules.
        ema: EMA copies by name (``encoder``, ``bottleneck``).
        plan: of the step.
        inputs: of the step, with masks.
        clock: of the step.
        hooks: pluggy's relay, or None to call modules directly.
        dtype: of signals.
        crop_free: views without a crop axis.
    """

    def __init__(
        self,
        model: Model,
        ema: Mapping[str, nn.Module],
        plan: Plan,
        inputs: Inputs,
        clock: StepClock,
        hooks: Any = None,
        dtype: torch.dtype = torch.float32,
        crop_free: frozenset[str] = frozenset(),
    ) -> None:
        self.model, self.ema, self.plan = model, ema, plan
        self.clock, self.hooks = clock, hooks
        self.signals = Signals(inputs, model.modality, model.spec.patch, clock.device, dtype, crop_free)
        self.values: dict[Node, dict[str, Any]] = {}
        self.runs: dict[Node, int] = {}

    # ---- handing out

    def hand(self, handout: Handout) -> Outputs:
        """One slot: every output cut to the reader's rows, crops first."""
        values = {output: self._cut(node, output, handout.rows) for output, node in handout.outputs.items()}
        mask = None if handout.mask is None else self.signals.mask(handout.mask)[:, : handout.rows]
        view = next(iter(handout.outputs.values())).view
        return Outputs(values, mask, self.signals.grid(view))

    def _cut(self, node: Node, output: str, rows: int) -> Any:
        value = self.value(node)[output]
        if output == "input" and self.signals.bare(node.view):
            return value[:rows]
        _, at, mask = output.partition("@")
        if at:
            most = self.plan.demands[node].rows[output]
            return value if most == rows else value[self.signals.within(mask, most, rows)]
        crops = self.signals.crops(node.view)
        if isinstance(value, tuple):  # a posterior is (mean, log-variance)
            return tuple(_crops_first(part, rows, crops) for part in value)
        return _crops_first(value, rows, crops)

    def release(self, stage: Stage) -> None:
        """After a stage: forget what no later stage reads, and free its graph from what stays."""
        for node in list(self.values):
            if node not in stage.keep:
                del self.values[node]
            elif node in stage.nodes:
                self.values[node] = {output: detached(value) for output, value in self.values[node].items()}

    # ---- nodes

    def value(self, node: Node) -> dict[str, Any]:
        """Outputs of a node, leading axis R*K; computed at the first call."""
        if node not in self.values:
            with torch.set_grad_enabled(node in self.plan.live):
                found = dict(getattr(self, f"_{node.kind}")(node))
            missing = [output for output in self.plan.demands[node].rows if output not in found]
            if missing:
                raise StackFault(f"{node} gives no {missing[0]!r}; it gives {', '.join(sorted(found))}")
            self.runs[node] = self.runs.get(node, 0) + 1
            self.values[node] = found
        return self.values[node]

    def _read(self, node: Node, output: str) -> Any:
        """An output of what the node reads; detached where the node's input is cut."""
        assert node.reads is not None
        value = self.value(node.reads)[output]
        return detached(value) if node.cut else value

    def _rows(self, node: Node, outputs: Iterable[str] | None = None) -> int:
        """Rows of R*K that the node computes for some of its outputs, or for all."""
        demand = self.plan.demands[node].rows
        return max(demand[o] for o in (demand if outputs is None else outputs)) * self.signals.crops(
            node.view
        )

    def _input(self, node: Node) -> dict[str, Any]:
        if node.view in self.signals.inputs.views:
            return {"input": self.signals.signal(node.view)}
        raw = self.signals.field(node.view)
        supplied = [output for output in self.plan.demands[node].rows if output != "input"]
        made = _tokens(raw) if supplied and node.view == "latent" else raw
        return {"input": raw, **dict.fromkeys(supplied, made)}

    def _encode(self, node: Node) -> dict[str, Any]:
        module = _present(self.ema.get("encoder") if node.source == "ema" else self.model.encoder, node)
        crops, demand = self.signals.crops(node.view), self.plan.demands[node].rows
        rows = max(demand.values())
        x = self.signals.signal(node.view)[: rows * crops]
        want = {output: count * crops for output, count in demand.items()}
        select = {mask: self.signals.places(mask, demand[o]) for o in want if (mask := o.partition("@")[2])}
        hidden = None
        if node.mask is not None:
            hidden = (
                self.signals.mask(node.mask)[:, :rows].transpose(0, 1).flatten(0, 1)
            )  # (K, R, N) -> (R*K, N)
        keys: dict[str, Any] = {"want": want, "mask": hidden, "select": select, "drop": node.drop}
        keys["clock"] = self._clock("encoder", node, crops)

        def call(signal: Tensor) -> Mapping[str, Tensor]:
            with _mode(module, node):
                return _run(module, node, signal, **keys)

        found = dict(self.hooks.vtp_encode(call=call, x=x) if self.hooks is not None else call(x))
        for output in want:
            base, at, mask = output.partition("@")
            if (
                at and output not in found and base in found
            ):  # an encoder may leave the gathering to the engine
                found[output] = found[base].flatten(0, 1)[select[mask]]  # (B, N, D) -> (M, D)
        return found

    def _bottleneck(self, node: Node) -> dict[str, Any]:
        chain = _present(self.ema.get("bottleneck") if node.source == "ema" else self.model.bottleneck, node)
        demand = self.plan.demands[node].rows
        whole = [output for output in demand if "@" not in output and output != "latent.cls"]
        found: dict[str, Any] = {}
        with _mode(chain, node):
            if whole:
                clock = self._clock(f"bottleneck/{node.draw}", node, self.signals.crops(node.view))
                found |= _run(chain, node, self._read(node, "patches")[: self._rows(node, whole)], clock)
            if "latent.cls" in demand:
                tokens = self._read(node, "cls")[: self._rows(node, ["latent.cls"])]
                found["latent.cls"] = self._single(chain, node, tokens)["latent"]
            for output in demand:
                base, at, mask = output.partition("@")
                if at:
                    tokens = self._masked(node, mask, demand[output])
                    found[output] = self._single(chain, node, tokens)[base]
        return found

    def _single(self, chain: nn.Module, node: Node, tokens: Tensor) -> dict[str, Tensor]:
        """The chain on separate tokens (M, D), without randomness; (M, C)."""
        made = _run(chain, node, tokens[:, None], None)  # (M, D) -> (M, 1, D)
        return {
            name: value[:, 0] for name, value in made.items() if isinstance(value, Tensor)
        }  # (M, 1, C) -> (M, C)

    def _masked(self, node: Node, mask: str, rows: int) -> Tensor:
        """Features at the masked places of the first rows, (M, D)."""
        assert node.reads is not None
        output = f"patches@{mask}"
        most = self.plan.demands[node.reads].rows[output]
        tokens: Tensor = self._read(node, output)
        return tokens if most == rows else tokens[self.signals.within(mask, most, rows)]

    def _decode(self, node: Node) -> dict[str, Any]:
        decoder = _present(self.model.decoder, node)
        z = _grid(self._read(node, "carried")[: self._rows(node)], self.signals.grid(node.view))
        want = frozenset(self.plan.demands[node].rows)
        clock = self._clock("decoder", node, self.signals.crops(node.view))

        def call(latent: Tensor) -> Mapping[str, Tensor]:
            with _mode(decoder, node):
                return _run(decoder, node, latent, want=want, clock=clock)

        return dict(self.hooks.vtp_decode(call=call, z=z) if self.hooks is not None else call(z))

    def _generate(self, node: Node) -> dict[str, Any]:
        generator, path = _present(self.model.generator, node), self.model.path
        rows = self._rows(node)
        x = self.model.standardise(_grid(self._read(node, "latent")[:rows], self.signals.grid(node.view)))
        clock = self._clock(f"generator/{node.draw}", node, self.signals.crops(node.view))
        fed, u, known = x, None, {"target": x, "clean": x}
        if path is not None:
            u = path.draw("u", rows, clock).to(x.dtype)
            noise = clock.normal("noise", *x.shape).to(x.dtype)
            fed = path.mix(x, noise, u)
            known |= {"u": u, "noise": noise, "noised": fed, "target": path.target(x, noise, u)}
        asked = frozenset(self.plan.demands[node].rows) - frozenset(known)
        if asked:
            with _mode(generator, node):
                known |= _run(generator, node, fed, u, self._condition(node, rows, clock), asked)
        return known

    def _condition(self, node: Node, rows: int, clock: StepClock) -> Any:
        """Labels or embeddings; in training a share of rows sees the null class ``classes``, or zeros."""
        name, rate = self.model.condition, self.model.drop_condition
        if name is None:
            return None
        crops = self.signals.crops(node.view)
        given = self.signals.field(name) if name in self.signals.inputs.fields else self.signals.signal(name)
        given = given[: rows // crops]
        if not isinstance(given, Tensor):
            if self.model.embed is None:
                raise StackFault(
                    f"generator.condition: nothing embeds {name!r}; its tokenizer exports no embed_text"
                )
            given = self.model.embed(given).to(self.signals.device)  # R texts -> (R, E)
        given = given.repeat_interleave(crops, 0)  # (R, ...) -> (R*K, ...)
        if rate == 0 or node.mode == "eval":
            return given
        dropped = clock.uniform("drop_condition", rows) < rate
        if given.is_floating_point():
            return torch.where(dropped[:, None], 0.0, given)  # the null of an embedding
        return torch.where(dropped, self.model.spec.classes, given)

    def _teach(self, node: Node) -> dict[str, Any]:
        name = node.source.partition(":")[2]
        x = self.model.modality.to_display(self.signals.signal(node.view)[: self._rows(node)])
        return dict(self.model.teachers[name](x, want=frozenset(self.plan.demands[node].rows)))

    def _clock(self, what: str, node: Node, crops: int) -> StepClock:
        """Draws of a module on a view: the same for every node that runs it there under one draw name."""
        return self.clock.of(f"{what}/{node.view}/{node.source}/{node.mask}", crops)


@contextlib.contextmanager
def _mode(module: nn.Module, node: Node) -> Iterator[None]:
    """Train or eval for this forward only."""
    wanted, before = node.mode == "train", module.training
    if before != wanted:
        module.train(wanted)
    try:
        yield
    finally:
        if before != wanted:
            module.train(before)


def _present(module: nn.Module | None, node: Node) -> nn.Module:
    if module is None:
        what = node.module if node.source == "student" else f"{node.source} {node.module}"
        raise StackFault(f"an objective reads what {node} gives, but the stack has no {what}")
    return module


def _run(module: nn.Module, node: Node, *args: Any, **keys: Any) -> Mapping[str, Any]:
    """Call a module; ``through`` lets gradient pass to its inputs and keeps it from its parameters."""
    if node.through:
        frozen = {name: parameter.detach() for name, parameter in module.named_parameters()}
        found = torch.func.functional_call(module, frozen, args, keys)
    else:
        found = module(*args, **keys)
    if not isinstance(found, Mapping):
        raise PluginFault(
            f"{type(module).__name__}: forward returns outputs by name, not {type(found).__name__}"
        )
    return found


def detached(value: Any) -> Any:
    """The value without its graph; tuples by part."""
    if isinstance(value, tuple):
        return tuple(detached(part) for part in value)
    return value.detach() if isinstance(value, Tensor) else value


def _crops_first(value: Tensor, rows: int, crops: int) -> Tensor:
    head = value[: rows * crops]
    first: Tensor = head.unflatten(0, (rows, crops)).transpose(0, 1)  # (R*K, ...) -> (K, R, ...)
    return first


def _grid(tokens: Tensor, grid: tuple[int, ...]) -> Tensor:
    z: Tensor = tokens.transpose(1, 2).unflatten(2, grid)  # (B, N, C) -> (B, C, *grid)
    return z


def _tokens(z: Tensor) -> Tensor:
    return z.flatten(2).transpose(1, 2)  # (B, C, *grid) -> (B, N, C)

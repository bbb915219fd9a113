"""Running a plan's nodes: each is computed once, on the fewest rows, and handed out as slices."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vtp_core.build import Model
from vtp_core.clock import StepClock
from vtp_core.errors import StackFault
from vtp_core.planner import Handout, Node, Plan
from vtp_plugins.needs import Outputs


@dataclass(slots=True)
class Inputs:
    """What a step reads: of this process, in the order of the batch.

    Attributes:
        views: (R, K, ...) as the loader made them, or (R, ...) for views without crops.
        fields: raw fields, tensors (R, ...) or lists.
        masks: (K, R, N) bool on the CPU, by sampler.
    """

    views: dict[str, Tensor]
    fields: dict[str, Any]
    masks: dict[str, Tensor] = field(default_factory=dict)


class Forwards:
    """Values of one step's nodes, computed when first read.

    Args:
        model: modules.
        ema: EMA copies by name (``encoder``, ``bottleneck``).
        plan: of the step.
        inputs: of the step.
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
        self.inputs, self.clock, self.hooks, self.dtype = inputs, clock, hooks, dtype
        self.crop_free = crop_free
        self.values: dict[Node, dict[str, Any]] = {}
        self.runs: dict[Node, int] = {}
        self._signals: dict[str, Tensor] = {}
        self._masks: dict[str, Tensor] = {}

    # ---- handing out

    def hand(self, handout: Handout) -> Outputs:
        """One slot: every output cut to the reader's rows, crops first."""
        values = {name: self._cut(node, name, handout.rows) for name, node in handout.outputs.items()}
        view = handout.need.view
        mask = self._mask_name(handout)
        shown = None
        if mask is not None:
            shown = self._mask(mask)[:, : handout.rows]
        grid = self.grid(view) if self._has_grid(view) else ()
        return Outputs(values, shown, grid)

    def _cut(self, node: Node, output: str, rows: int) -> Any:
        value = self.value(node)[output]
        if node.kind == "input" and (node.view in self.inputs.fields or node.view in self.crop_free):
            return value[:rows]
        crops = self._crops(node.view)
        if "@" in output:
            return self._cut_places(value, node, output, rows)
        if isinstance(value, tuple):  # a posterior is (mean, log-variance)
            return tuple(_crops_first(part, rows, crops) for part in value)
        return _crops_first(value, rows, crops)

    def _cut_places(self, value: Tensor, node: Node, output: str, rows: int) -> Tensor:
        """Features at masked places of the first rows: a subset in the same order."""
        if self.plan.demands[node].rows[output] == rows:
            return value
        mask = self.inputs.masks[output.partition("@")[2]][:, : self.plan.demands[node].rows[output]]
        keep = mask.nonzero()[:, 1] < rows  # (M,), the row of each place
        return value[keep.to(value.device)]

    def _mask_name(self, handout: Handout) -> str | None:
        for output in handout.outputs:
            if "@" in output:
                return output.partition("@")[2]
        return next((n.mask for n in handout.outputs.values() if n.mask), None)

    # ---- inputs

    def _crops(self, view: str) -> int:
        if view == "latent":
            return 1
        return int(self.inputs.views[view].shape[1])

    def _has_grid(self, view: str) -> bool:
        return view in self.inputs.views and view not in self.crop_free

    def grid(self, view: str) -> tuple[int, ...]:
        """Tokens along each axis of a view."""
        size = self.inputs.views[view].shape[3:]
        return tuple(s // p for s, p in zip(size, self.model.spec.patch, strict=True))

    def _mask(self, name: str) -> Tensor:
        """(K, R, N) on the device."""
        if name not in self._masks:
            self._masks[name] = self.inputs.masks[name].to(self.clock.device, non_blocking=True)
        return self._masks[name]

    def signal(self, view: str) -> Tensor:
        """A view as the encoder reads it, (R*K, ch, *size); made once a step."""
        if view not in self._signals:
            raw = self.inputs.views[view].to(self.clock.device, non_blocking=True)
            if view in self.crop_free:
                self._signals[view] = raw
            else:
                flat = raw.flatten(0, 1)  # (R, K, ch, *size) -> (R*K, ch, *size)
                self._signals[view] = self.model.modality.normalise(flat).to(self.dtype)
        return self._signals[view]

    # ---- nodes

    def value(self, node: Node) -> dict[str, Any]:
        """Outputs of a node, leading axis R*K; computed at the first call."""
        if node not in self.values:
            self.runs[node] = self.runs.get(node, 0) + 1
            with contextlib.nullcontext() if node in self.plan.live else torch.no_grad():
                self.values[node] = getattr(self, f"_{node.kind}")(node)
        return self.values[node]

    def _read(self, node: Node, output: str) -> Any:
        """An output of what the node reads; detached where the node's input is cut."""
        assert node.reads is not None
        value = self.value(node.reads)[output]
        return value.detach() if node.cut and isinstance(value, Tensor) else value

    def _rows(self, node: Node, output: str) -> int:
        return self.plan.demands[node].rows.get(output, 0)

    def _input(self, node: Node) -> dict[str, Any]:
        if node.view in self.inputs.fields:
            raw = self.inputs.fields[node.view]
            value = raw.to(self.clock.device) if isinstance(raw, Tensor) else raw
            if node.view == "latent":
                value = _tokens(value.to(self.dtype))
            return dict.fromkeys(self.plan.demands[node].rows, value)
        return {"input": self.signal(node.view)}

    def _encode(self, node: Node) -> dict[str, Any]:
        crops, demand = self._crops(node.view), self.plan.demands[node]
        rows = max(demand.rows.values())
        x = self.signal(node.view)[: rows * crops]
        want = {output: count * crops for output, count in demand.rows.items()}
        select = {o.partition("@")[2]: self._places(o.partition("@")[2], demand.rows[o]) for o in want if "@" in o}
        module = self.ema["encoder"] if node.source == "ema" else self.model.encoder
        assert module is not None
        mask = None
        if node.mask is not None:
            mask = self._mask(node.mask)[:, :rows].transpose(0, 1).flatten(0, 1)  # (K, R, N) -> (R*K, N)

        def call(signal: Tensor) -> Mapping[str, Tensor]:
            with self._mode(module, node):
                keys = {"want": want, "mask": mask, "select": select, "drop": node.drop}
                return _run(module, node.through, signal, clock=self._clock("encoder", node, crops), **keys)

        found = self.hooks.vtp_encode(call=call, x=x) if self.hooks is not None else call(x)
        return self._completed(dict(found), want, select, node)

    def _places(self, mask: str, rows: int) -> Tensor:
        """Flat places (r*K + k)*N + n of the masked tokens, in the order of ``patches[mask]``; (M,)."""
        shown = self.inputs.masks[mask][:, :rows]
        crops, _, tokens = shown.shape
        k, r, n = shown.nonzero().unbind(1)
        return ((r * crops + k) * tokens + n).to(self.clock.device)

    def _completed(
        self, found: dict[str, Any], want: Mapping[str, int], select: Mapping[str, Tensor], node: Node
    ) -> dict[str, Any]:
        """An encoder may leave the gathering of masked places to the engine."""
        for output in want:
            base, at, place = output.partition("@")
            if output not in found and at and base in found:
                found[output] = found[base].flatten(0, 1)[select[place]]  # (B, N, D) -> (M, D)
            if output not in found:
                raise StackFault(f"{node} gives no {output!r}; it gives {', '.join(sorted(found))}")
        return found

    def _bottleneck(self, node: Node) -> dict[str, Any]:
        crops = self._crops(node.view)
        chain = self.ema["bottleneck"] if node.source == "ema" else self.model.bottleneck
        assert chain is not None
        clock = self._clock(f"bottleneck/{node.draw}", node, crops)
        found: dict[str, Any] = {}
        demand = self.plan.demands[node].rows
        with self._mode(chain, node):
            whole = [o for o in demand if "@" not in o and o != "latent.cls"]
            if whole:
                tokens = self._read(node, "patches")[: max(demand[o] for o in whole) * crops]
                found |= _run(chain, node.through, tokens, clock)
            for output in set(demand) - set(whole):
                source = "cls" if output == "latent.cls" else f"patches@{output.partition('@')[2]}"
                tokens = self._read(node, source)
                if source == "cls":
                    tokens = tokens[: demand[output] * crops]
                found[output] = _run(chain, node.through, tokens[:, None], None)["latent"][:, 0]
        return found

    def _decode(self, node: Node) -> dict[str, Any]:
        demand, crops = self.plan.demands[node].rows, self._crops(node.view)
        assert node.reads is not None
        source = "latent" if node.reads.kind == "input" else "carried"
        tokens = self._read(node, source)[: max(demand.values()) * crops]
        z = _grid(tokens, self._latent_grid(node))
        decoder = self.model.decoder
        if decoder is None:
            raise StackFault("an objective reads 'decoded', but the stack has no decoder; write decoder: {use: vit_pixels}")

        def call(latent: Tensor) -> Mapping[str, Tensor]:
            with self._mode(decoder, node):
                clock = self._clock("decoder", node, crops)
                return _run(decoder, node.through, latent, want=frozenset(demand), clock=clock)

        return dict(self.hooks.vtp_decode(call=call, z=z) if self.hooks is not None else call(z))

    def _latent_grid(self, node: Node) -> tuple[int, ...]:
        return self.grid(node.view) if node.view in self.inputs.views else self.model.spec.grid

    def _generate(self, node: Node) -> dict[str, Any]:
        generator, path, demand = self.model.generator, self.model.path, self.plan.demands[node].rows
        if generator is None:
            raise StackFault("an objective reads a generator's output, but the stack has no generator")
        assert node.reads is not None
        crops = self._crops(node.view) if node.reads.kind != "input" else 1
        rows = max(demand.values()) * crops
        x = self.standardise(_grid(self._read(node, "latent")[:rows], self._latent_grid(node)))
        clock = self._clock(f"generator/{node.draw}", node, crops)
        known: dict[str, Any] = {}
        fed, u = x, None
        if path is not None:
            u = path.draw("u", rows, clock).to(x.dtype)
            noise = clock.normal("noise", *x.shape).to(x.dtype)
            fed = path.mix(x, noise, u)
            known = {"u": u, "noised": fed, "target": path.target(x, noise, u)}
        else:
            known = {"target": x}
        asked = frozenset(o for o in demand if o not in known)
        if asked:
            with self._mode(generator, node):
                known |= _run(generator, node.through, fed, u, self._condition(rows, crops, clock), asked)
        return known

    def _condition(self, rows: int, crops: int, clock: StepClock) -> Any:
        """The conditioning field, with a share of rows turned into the null class (index ``classes``)."""
        if self.model.condition is None:
            return None
        labels = self.inputs.fields[self.model.condition]
        labels = labels.to(self.clock.device)[: rows // crops].repeat_interleave(crops, 0)
        if self.model.drop_condition == 0:
            return labels
        dropped = clock.uniform("drop_condition", rows) < self.model.drop_condition
        return torch.where(dropped, torch.full_like(labels, self.model.spec.classes), labels)

    def standardise(self, z: Tensor) -> Tensor:
        """Raw latents (B, C, *grid) as generators see them."""
        if not self.model.statistics:
            return z
        shape = (1, -1, *([1] * (z.ndim - 2)))
        mean, std = (self.model.statistics[k].to(z).view(shape) for k in ("mean", "std"))
        return (z - mean) / std

    def _teach(self, node: Node) -> dict[str, Any]:
        demand, crops = self.plan.demands[node].rows, self._crops(node.view)
        teacher = self.model.teachers[node.source.partition(":")[2]]
        x = self.model.modality.to_display(self.signal(node.view)[: max(demand.values()) * crops])
        return dict(teacher(x, want=frozenset(demand)))

    # ---- context of a forward

    def _clock(self, what: str, node: Node, crops: int) -> StepClock:
        return self.clock.of(f"{what}/{node.view}/{node.source}/{node.mask}", crops)

    @contextlib.contextmanager
    def _mode(self, module: nn.Module, node: Node) -> Iterator[None]:
        """Train or eval for this forward only; EMA copies are always in eval mode."""
        wanted = node.mode == "train" and node.source != "ema"
        before = module.training
        if before != wanted:
            module.train(wanted)
        try:
            yield
        finally:
            if before != wanted:
                module.train(before)

    def release(self, keep: frozenset[Node]) -> None:
        """Forget nodes nobody reads any more, and detach those that a later stage reads."""
        for node in list(self.values):
            if node not in keep:
                del self.values[node]
            else:
                self.values[node] = {k: _detached(v) for k, v in self.values[node].items()}


def _run(module: nn.Module, through: bool, *args: Any, **keys: Any) -> Mapping[str, Any]:
    """Call a module; ``through`` lets gradient pass to its inputs and keeps it from its parameters."""
    found: Mapping[str, Any]
    if through:
        frozen = {name: parameter.detach() for name, parameter in module.named_parameters()}
        found = torch.func.functional_call(module, frozen, args, keys)
    else:
        found = module(*args, **keys)
    return found


def _detached(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_detached(part) for part in value)
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

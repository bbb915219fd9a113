"""Tensors without values, of which the CPU's kernels are asked for shapes; small known values stay known."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_iter, tree_unflatten
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
CPU = torch.device("cpu")
_LARGEST = 2**20  # elements of a value that is kept
_INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
_EMPTY = (aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default)
_ATTENTION = {  # which counts the FLOPs of an operator that torch has no formula for
    aten._scaled_dot_product_flash_attention_for_cpu: aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: aten._scaled_dot_product_flash_attention_backward,
}


class Unknown(RuntimeError):
    """A value was asked for that is not there: a branch or a size depends on data."""


VALUES = (Unknown, DataDependentOutputException, DynamicOutputShapeException)
"""What asking for a value raises."""


class Imagined(TorchDispatchMode):
    """Runs every operator on shapes alone, as torch's fake tensors on the meta device do.

    What follows from masks, places and other small values at hand is computed beside it, so that a choice by
    value has its true size. Collectives are noted and never made.

    Attributes:
        counted: told of every operator's FLOPs.
        sent: told of every collective: the operator's name and its arguments.
        made: told of every tensor that an operator gives.
        bounded: told when something picks by values that are not known, and so all is taken as picked.
        answer: asked what an unknown value reads as; None refuses.
        outside: storages of tensors that were there before, by address, which is theirs while they are held.
        held: bytes of weights that no module told of.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fake: Any = FakeTensorMode(allow_non_fake_inputs=True)
        self.counted: Callable[[int], None] = lambda flops: None
        self.sent: Callable[[str, Any], None] = lambda name, arguments: None
        self.made: Callable[[Tensor], None] = lambda tensor: None
        self.bounded: Callable[[], None] = lambda: None
        self.answer: Callable[[], float | None] = lambda: None
        self.outside: dict[int, Any] = {}
        self.held = 0
        self._spoilt: set[int] = set()  # storages of values that became unknown
        # Plain tensors that were met, held so that an id stays theirs.
        self._others: dict[int, tuple[Tensor, FakeTensor]] = {}

    def __enter__(self) -> Imagined:
        self.fake.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self.fake.__exit__(*error)

    def take(self, tensors: Iterable[Tensor]) -> None:
        """Make parameters and buffers ours, in place: whoever holds one holds it after."""
        for tensor in tensors:
            if not isinstance(tensor, FakeTensor):
                torch.utils.swap_tensors(tensor, self._empty(tensor))
            self._leave(tensor)

    def _leave(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.outside[storage._cdata] = storage

    def another(self, like: Tensor) -> FakeTensor:
        """A tensor of the same kind, there from the start."""
        found = self._empty(like)
        self._leave(found)
        return found

    def _empty(self, like: Tensor) -> FakeTensor:
        with _disable_current_modes():
            shape = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="meta")
            found = FakeTensor(self.fake, shape, CPU)
        found.requires_grad_(like.requires_grad)
        if isinstance(like, nn.Parameter):
            found._is_param = True
        return found

    # ---- operators

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        kwargs = kwargs or {}
        leaves, spec = tree_flatten((args, kwargs))
        foreign = {type(x) for x in leaves if isinstance(x, Tensor)} - {FakeTensor}
        if foreign - {Tensor, nn.Parameter}:
            return NotImplemented  # a sharded tensor sees to its parts itself
        if foreign:
            leaves = [self._fake(x) if isinstance(x, Tensor) else x for x in leaves]
            args, kwargs = tree_unflatten(leaves, spec)
        if func.namespace in {"c10d", "_c10d_functional"}:
            self.sent(func.name(), args)
            return func(*args, **kwargs)
        known = self._values(func, leaves)
        if torch.Tag.data_dependent_output in func.tags:
            return self._read(func, known, spec)
        if func not in _INDEXED and torch.Tag.dynamic_output_shape in func.tags:
            return self._sized(func, known, args, spec)
        out = func(*self._placed(func, args), **kwargs)
        for made in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(made, FakeTensor):
                self.made(made)
        if known is not None and all(x.numel() <= _LARGEST for x in tree_iter(out) if isinstance(x, Tensor)):
            self._remember(out, _computed(func, known, spec))
        else:
            self._forget(func, args)
        formula = flop_registry.get(_ATTENTION.get(func._overloadpacket, func._overloadpacket))
        if formula is not None:
            self.counted(int(formula(*args, **kwargs, out_val=out)))
        return out

    def _fake(self, tensor: Tensor) -> FakeTensor:
        """A plain tensor as one of ours: small ones keep their values, those on meta have none."""
        if isinstance(tensor, FakeTensor):
            return tensor
        if id(tensor) not in self._others:
            if tensor.is_meta:
                made = self._empty(tensor)
            else:
                made = self.fake.from_tensor(tensor)
                if tensor.numel() <= _LARGEST:
                    with _disable_current_modes():
                        made.known = tensor.detach().clone()
                if tensor.is_floating_point():
                    self.held += tensor.nbytes
            self._others[id(tensor)] = tensor, made
            self._leave(tensor)
            self._leave(made)
        return self._others[id(tensor)][1]

    def _known(self, tensor: FakeTensor) -> Tensor | None:
        found: Tensor | None = getattr(tensor, "known", None)
        return None if found is None or found.untyped_storage()._cdata in self._spoilt else found

    # ---- values

    def _values(self, func: Any, leaves: list[Any]) -> list[Any] | None:
        """The arguments with values, if all that are read have some and nothing is drawn at random."""
        if func.namespace != "aten" or func in _EMPTY:
            return None
        drawn = torch.Tag.nondeterministic_seeded in func.tags
        if drawn and not any(isinstance(x, torch.Generator) for x in leaves):
            return None
        known = []
        for x in leaves:
            value = self._known(x) if isinstance(x, FakeTensor) else x
            if value is None and x is not None:
                return None
            known.append(value)
        return known

    def _read(self, func: Any, known: list[Any] | None, spec: Any) -> Any:
        if known is not None:
            return _computed(func, known, spec)
        answer = self.answer()
        if answer is None:
            raise Unknown(f"{func.name()} asks for a value, and a plan has none")
        return answer

    def _sized(self, func: Any, known: list[Any] | None, args: Any, spec: Any) -> Any:
        """A result whose size depends on values."""
        if known is None:
            return self._all_of(func, args)
        value = _computed(func, known, spec)
        leaves, shape = tree_flatten(value)
        out = tree_unflatten([self._empty(x) if isinstance(x, Tensor) else x for x in leaves], shape)
        self._remember(out, value)
        return out

    def _all_of(self, func: Any, args: Any) -> FakeTensor:
        """What picks by unknown values picks all: an upper bound."""
        x = args[0]
        with _disable_current_modes():
            if func is aten.nonzero.default:
                most = torch.empty(x.numel(), x.ndim, dtype=torch.int64, device="meta")
            elif func is aten.masked_select.default:
                shape = torch.broadcast_shapes(x.shape, args[1].shape)
                most = torch.empty(shape.numel(), dtype=x.dtype, device="meta")
            else:
                raise Unknown(f"the size of what {func.name()} gives depends on values, and a plan has none")
        self.bounded()
        return self._empty(most)

    def _placed(self, func: Any, args: Any) -> Any:
        """The arguments, with masks that index as the places where they are true."""
        if func not in _INDEXED:
            return args
        return args[0], [place for index in args[1] for place in self._places(index)], *args[2:]

    def _places(self, index: FakeTensor | None) -> list[Tensor | None]:
        if index is None or index.dtype not in {torch.bool, torch.uint8}:
            return [index]
        known = self._known(index)
        if known is None:
            return list(self._all_of(aten.nonzero.default, (index,)).unbind(1))
        with _disable_current_modes():
            places = known.nonzero().unbind(1)
        return [self._empty(place.contiguous()) for place in places]

    def _remember(self, out: Any, value: Any) -> None:
        for made, known in zip(tree_iter(out), tree_iter(value), strict=True):
            if isinstance(made, FakeTensor):
                made.known = known  # type: ignore[attr-defined]

    def _forget(self, func: Any, args: Any) -> None:
        """What something unknown is written into is unknown from now on, and so is every view of it."""
        for argument, given in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tree_iter(given):
                    if (known := getattr(tensor, "known", None)) is not None:
                        self._spoilt.add(known.untyped_storage()._cdata)


class Copying(TorchFunctionMode):
    """Inside, deep copies of tensors without values are others of their kind."""

    def __init__(self, imagined: Imagined) -> None:
        super().__init__()
        self.imagined = imagined

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        if id(tensor) not in memo:
            memo[id(tensor)] = self.imagined.another(tensor)
        return memo[id(tensor)]


def _computed(func: Any, leaves: list[Any], spec: Any) -> Any:
    """What the operator gives on values, on the CPU."""
    args, kwargs = tree_unflatten(leaves, spec)
    if "device" in kwargs:
        kwargs["device"] = CPU
    with _disable_current_modes():
        return func(*args, **kwargs)

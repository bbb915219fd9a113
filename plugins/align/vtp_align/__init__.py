"""Alignment with a frozen teacher: one objective for REPA, iREPA, VA-VAE, GAE, GigaTok and Semantic-VAE.

| method | what the stack writes beside ``to`` |
|---|---|
| REPA (arXiv 2410.06940) | ``on: hidden:8, projector: mlp3, distance: neg_cosine``, weight 0.5 |
| iREPA | ``on: hidden:8, projector: conv3x3, normalise: spatial, distance: neg_cosine``, weight 1 |
| VA-VAE (2501.01423) | ``on: latent.sample, projector: linear``, the two ``terms`` below, weight 0.1, balanced |
| GAE (2603.10365) | ``on: latent, distance: mse`` on a teacher of the latent's width with ``normalise: rms`` |
| GigaTok (2504.08736) | ``on: decoder.hidden:3, projector: mlp3, distance: neg_cosine``, weight 0.5 |
| Semantic-VAE (2509.22167) | ``on: latent.sample, projector: conv_mish, side: teacher, resize: bilinear``, neg_cosine |

VA-VAE's terms: ``{mcos: {distance: cosine, margin: 0.5}, mdms: {scope: pairs, distance: l1, margin: 0.25}}``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from vtp_align.distances import Distance, Scope
from vtp_align.distances import Term as Term
from vtp_align.maps import Grid, Normalise, Resize, grid_of, normalised, resized, unequal
from vtp_align.projectors import Kind, Of, Projector, Side, source_of, student_width, teacher_width
from vtp_core.data.views import Plain
from vtp_core.nn.chunked import wide
from vtp_core.nn.precision import full_precision
from vtp_plugins.clock import Clock
from vtp_plugins.needs import Need, Outputs
from vtp_plugins.objective import Objective
from vtp_plugins.spec import Spec


class Align(Objective):
    """Distances between tokens of the model and of a teacher, one of which may be projected.

    In order: the teacher's tokens take the student's grid (or the reverse), are normalised; both are pooled;
    one is projected; the terms compare them. The teacher is frozen and sees the view's picture without noise.

    Args:
        spec: shapes of the tokenizer, and the teachers' widths.
        to: name of the teacher, under the stack's ``teachers``.
        target: the teacher's output: ``patches``, ``cls`` or ``hidden:k``.
        on: what is aligned with it: ``cls``, ``patches``, ``hidden:k``, ``latent``, ``latent.sample``, ...,
            ``decoder.hidden:k``.
        of: who gives it; ``auto`` is the generator for ``hidden:k`` where there is one, else the student.
        projector: ``none``, or a kind of :class:`vtp_align.projectors.Projector`.
        hidden: width inside ``mlp3`` and ``conv_mish``.
        bias: of a ``linear`` projector.
        side: who is projected, to the other's width.
        head: a shared projector, named under the stack's ``modules``, in place of an own one.
        width: channels of ``on``, where a decoder's are not the encoder's.
        distance: as in :class:`vtp_align.distances.Term`, of the only term.
        margin: likewise.
        scope: likewise.
        terms: several terms on one projection, by name, in place of ``distance``, ``margin`` and ``scope``.
        pooling: of tokens to one vector, before the projector.
        resize: how maps of tokens change their grid; ``none`` insists on equal ones.
        resize_side: whose map takes the other's grid.
        normalise: of the teacher's tokens: ``spatial`` takes every channel's mean and deviation over the
            tokens out, ``layer``, ``rms`` and ``l2`` work token by token.
        mean_share: share of the mean that ``spatial`` takes out (iREPA's gamma).
        detach: no gradient to that side: ``teacher`` includes its projector, which then stays as drawn;
            ``student`` leaves a projector to be trained.
        cut: as in :class:`vtp_plugins.Need`; None cuts ``latent`` off a generator and nothing otherwise.
        through: likewise: modules that pass gradient and receive none.
        mode: likewise, of the modules' forward.
        view: which view both see.

    Raises:
        ValueError: options that contradict each other, or widths that differ without a projector.
        LookupError: no such teacher.
    """

    head: Any  # a Projector, or what maps (tokens, grid) to tokens
    sizes: ClassVar[dict[str, dict[str, Any]]] = Projector.sizes

    def __init__(
        self,
        spec: Spec,
        *,
        to: str,
        target: str = "patches",
        on: str = "patches",
        of: Of = "auto",
        projector: Kind | Literal["none"] = "none",
        hidden: Annotated[int, Field(gt=0)] = 2048,
        bias: bool = False,
        side: Side = "student",
        head: nn.Module | None = None,
        width: Annotated[int, Field(gt=0)] | None = None,
        distance: Distance = "cosine",
        margin: Annotated[float, Field(ge=0)] = 0.0,
        scope: Scope = "token",
        terms: dict[str, Term] | None = None,
        pooling: Literal["none", "mean", "max"] = "none",
        resize: Resize = "none",
        resize_side: Side = "teacher",
        normalise: Normalise = "none",
        mean_share: float = 1.0,
        detach: Literal["none", "student", "teacher"] = "none",
        cut: tuple[str, ...] | None = None,
        through: tuple[str, ...] = (),
        mode: Literal["train", "eval"] = "train",
        view: str = "image",
    ) -> None:
        super().__init__()
        source = source_of(spec, on, of)
        own = {distance: Term(distance=distance, margin=margin, scope=scope)}
        self.terms = {name: Term.model_validate(term) for name, term in (terms or own).items()}
        self.on, self.target, self.teacher, self.side, self.detach = on, target, to, side, detach
        self.pooling, self.resize, self.resize_side = pooling, resize, resize_side
        self.normalise, self.mean_share, self.grid = normalise, mean_share, spec.grid
        if projector != "none" and head is None:
            head = Projector(
                spec, to=to, on=on, of=of, kind=projector, hidden=hidden, bias=bias, side=side, width=width
            )
        self.head = head
        self._check(student_width(spec, on, of, width), teacher_width(spec, to), source)
        if detach == "teacher" and side == "teacher" and head is not None:
            head.requires_grad_(False)
        self.coupled = any(term.scope == "batch" for term in self.terms.values())
        if cut is None:
            cut = ("latent",) if source == "generator" else ()
        self.needs = {
            "student": Need(view, on, source, mask=None, mode=mode, through=through, cut=cut),
            "teacher": Need(view, target, f"teacher:{to}", mask=None),
        }
        if view == "image" and spec.modality == "image":
            self.views = {"image": Plain(spec)}

    def _check(self, inner: int, outer: int, source: str) -> None:
        """Refuse options that contradict each other."""
        vectors = {self._is_vector(self.on), self._is_vector(self.target)}
        if len(vectors) > 1:
            raise ValueError(
                f"on: {self.on} and target: {self.target} are one vector against many tokens; "
                "set pooling: mean, or make both cls or both tokens"
            )
        for term in self.terms.values():
            term.check()
            if term.scope == "pairs" and vectors == {True}:
                raise ValueError(
                    "scope: pairs compares tokens of one signal, but there is one vector; use batch"
                )
        if vectors == {True} and self.normalise == "spatial":
            raise ValueError(
                "normalise: spatial is over tokens, but there is one vector; use layer, rms or l2"
            )
        if vectors == {True} and getattr(self.head, "kind", "").startswith("conv"):
            raise ValueError(f"projector: {self.head.kind} reads a map, but there is one vector; use mlp3")
        pairwise = all(term.scope != "token" for term in self.terms.values())
        if self.head is None and inner != outer and not pairwise:
            raise ValueError(
                f"projector: none takes equal widths, but {self.on} has {inner} channels and teacher "
                f"{self.teacher!r} {outer}; set projector: linear or mlp3"
            )
        learns = self.head is not None and not (self.detach == "teacher" and self.side == "teacher")
        if (self.detach == "student" or source == "ema") and not learns:
            raise ValueError(
                "detach, of: no gradient reaches anything; add a projector, or train the student"
            )

    def _is_vector(self, output: str) -> bool:
        return self.pooling != "none" or output in {"cls", "latent.cls"}

    def forward(self, got: Mapping[str, Outputs], clock: Clock) -> dict[str, Tensor]:
        """Shapes: K crops, R rows, B = K R, N tokens, C channels."""
        x, y = _tokens(got["student"][self.on]), _tokens(got["teacher"][self.target])
        y = y.to(x.dtype)
        if self.detach == "student":
            x = x.detach()
        grid: Grid = (1,)
        if not (self._is_vector(self.on) and self._is_vector(self.target)):
            x, y, grid = self._on_one_grid(x, y, got["student"].grid or self.grid)
        y = normalised(y, self.normalise, self.mean_share)
        x, y = self._pooled(x), self._pooled(y)
        if self.head is not None and self.side == "student":
            x = wide(self.head(x, grid))
        elif self.head is not None:
            y = wide(self.head(y, grid))
        if self.detach == "teacher":
            y = y.detach()
        with full_precision(x):
            return {name: term(x, y, clock) for name, term in self.terms.items()}

    def _on_one_grid(self, x: Tensor, y: Tensor, like: Grid) -> tuple[Tensor, Tensor, Grid]:
        own = grid_of(x, like, f"on: {self.on}")
        other = grid_of(y, like, f"teachers.{self.teacher}")
        if own == other:
            return x, y, own
        if self.resize == "none":
            raise unequal(f"on: {self.on}", own, f"teacher {self.teacher!r}", other)
        if self.resize_side == "student":
            return resized(x, own, other, self.resize), y, other
        return x, resized(y, other, own, self.resize), own

    def _pooled(self, x: Tensor) -> Tensor:
        if self.pooling == "none":
            return x
        return x.mean(1, keepdim=True) if self.pooling == "mean" else x.amax(1, keepdim=True)


def _tokens(value: Tensor) -> Tensor:
    """Outputs of all crops as tokens, in full precision: (K, R, N, C), or (K, R, D) as N = 1."""
    tokens = value if value.ndim == 4 else value[:, :, None]  # (K, R, D) -> (K, R, 1, D)
    return wide(tokens.flatten(0, 1))  # (K, R, N, C) -> (B, N, C)

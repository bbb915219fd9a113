"""The convolutional encoder and decoder of VQGAN and LDM (arXiv 2012.09841, appendix; arXiv 2112.10752)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, cast

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from vtp_ldm.layers import EPS, Level, Middle
from vtp_ldm.shape import SIZES, Range, Signed, check_picture, shape_of
from vtp_plugins.clock import Clock
from vtp_plugins.errors import StackFault
from vtp_plugins.spec import Spec

Count = Annotated[int, Field(gt=0)]
Multipliers = Annotated[tuple[Count, ...], Field(min_length=1)]


class CNNEncoder(nn.Module):
    """Residual blocks on ever smaller maps; a place of the last map is a token.

    Outputs: ``patches``, what the last convolution gives: with ``double_z`` the moments of a posterior before
    the bottleneck's matrix; and ``cls``, their mean. It masks nothing and drops nothing.

    Args:
        spec: channels and number of axes of the signal.
        channels: width that ``multipliers`` multiply.
        multipliers: one a level; every level but the first halves the side.
        blocks: residual blocks of a level.
        attention: sides of the map at which blocks have attention behind them, counted from ``resolution``.
        resolution: nominal side of the picture; ``image_size``'s, where it is not written.
        image_size: size of the picture in training, one number or (H, W).
        z_channels: channels of the last map, half of them with ``double_z``.
        double_z: whether mean and log-variance leave, or a latent.
        groups: of the norms.
        range: what the network reads: ``signed`` takes what the modality normalised back to [-1, 1].
    """

    sizes: ClassVar[dict[str, dict[str, Any]]] = {
        dial: {**options, "image_size": 64} for dial, options in SIZES.items()
    }

    def __init__(
        self,
        spec: Spec,
        *,
        channels: Count = 128,
        multipliers: Multipliers = (1, 1, 2, 2, 4),
        blocks: Count = 2,
        attention: tuple[int, ...] = (16,),
        resolution: Count | None = None,
        image_size: Count | tuple[Count, Count] = 256,
        z_channels: Count = 32,
        double_z: bool = True,
        groups: Count = 32,
        range: Range = "signed",
    ) -> None:
        super().__init__()
        check_picture(spec, range)
        self.size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        shape = shape_of(channels, multipliers, groups, attention, resolution or min(self.size))
        self.patch, self.channels, self.depth = (shape.patch, shape.patch), spec.signal_channels, 0
        self._check(self.size)
        self.width = 2 * z_channels if double_z else z_channels
        self.range = Signed() if range == "signed" else None
        widths, last = shape.widths, shape.levels[-1]
        self.conv_in = nn.Conv2d(spec.signal_channels, channels, 3, padding=1)
        self.down = nn.ModuleList(
            Level(
                widths[level - 1] if level else channels, widths[level], blocks, groups,
                shape.attends[level], "downsample" if level < last else "",
            )
            for level in shape.levels
        )  # fmt: skip
        self.mid = Middle(widths[-1], groups)
        self.norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], self.width, 3, padding=1)

    @property
    def anchors(self) -> Mapping[str, nn.Parameter]:
        """``last``: the weight of the last convolution."""
        return {"last": cast(nn.Parameter, self.conv_out.weight)}

    def _check(self, size: tuple[int, ...]) -> None:
        if any(side % p or side < p for side, p in zip(size, self.patch, strict=True)):
            raise ValueError(
                f"image_size: {size[0]} x {size[1]} is not a multiple of {self.patch[0]}, by which the levels "
                "of multipliers shrink it; change one of them"
            )

    def forward(
        self,
        x: Tensor,
        *,
        want: Mapping[str, int] | None = None,
        mask: Tensor | None = None,
        select: Mapping[str, Tensor] | None = None,
        drop: float | None = None,
        clock: Clock | None = None,
    ) -> dict[str, Tensor]:
        """Features of x (B, ch, H, W); arguments as in :class:`vtp_plugins.protocols.Encoder`.

        Raises:
            StackFault: a mask or a drop-path rate, which this network has no use for, or another output.
            ValueError: another signal.
        """
        want = {"cls": len(x), "patches": len(x)} if want is None else want
        self._refuse(x, want, mask, drop)
        x = x[: max(want.values())]
        h = self.conv_in(x if self.range is None else self.range.entered(x))
        for level in self.down:
            h = level(h)
        h = self.conv_out(F.silu(self.norm_out(self.mid(h))))
        patches = h.flatten(2).transpose(1, 2)  # (B, D, h, w) -> (B, N, D)
        # places are left to the engine to pick
        return {"patches": patches, "cls": patches.mean(1)} if "cls" in want else {"patches": patches}

    def _refuse(self, x: Tensor, want: Mapping[str, int], mask: Tensor | None, drop: float | None) -> None:
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(f"the encoder reads (B, {self.channels}, H, W), not {tuple(x.shape)}")
        self._check(tuple(x.shape[2:]))
        for output in want:
            if output not in {"cls", "patches"} and not output.startswith("patches@"):
                raise StackFault(f"encoder ldm_cnn has no output {output!r}; it gives cls and patches")
        if mask is not None:
            raise StackFault("encoder ldm_cnn has no mask token; masked objectives need encoder: {use: vit}")
        if drop:
            raise StackFault(f"encoder ldm_cnn has no drop-path; leave the objective's drop: {drop} out")


class CNNDecoder(nn.Module):
    """The encoder's mirror, with one block more a level. Output: ``decoded``.

    Args:
        spec: channels of the latent and of the signal, patch and size.
        channels: width that ``multipliers`` multiply.
        multipliers: one a level, as the encoder's.
        blocks: residual blocks of an encoder's level; here there is one more.
        attention: as for the encoder.
        resolution: as for the encoder.
        z_channels: channels of the map that the first convolution reads; the latent's by default.
        project: a matrix over the latent's channels first, which is the reference's ``post_quant_conv``.
        groups: of the norms.
        range: of what the network gives, as for the encoder.
    """

    sizes: ClassVar[dict[str, dict[str, Any]]] = SIZES

    def __init__(
        self,
        spec: Spec,
        *,
        channels: Count = 128,
        multipliers: Multipliers = (1, 1, 2, 2, 4),
        blocks: Count = 2,
        attention: tuple[int, ...] = (16,),
        resolution: Count | None = None,
        z_channels: Count | None = None,
        project: bool = True,
        groups: Count = 32,
        range: Range = "signed",
    ) -> None:
        super().__init__()
        check_picture(spec, range)
        shape = shape_of(channels, multipliers, groups, attention, resolution or min(spec.size))
        if spec.patch != (shape.patch, shape.patch):
            raise ValueError(
                f"multipliers: {len(multipliers)} levels enlarge by {shape.patch}, but the encoder shrinks "
                f"by {spec.patch[0]}; give both as many"
            )
        z_channels = z_channels or spec.channels
        if not project and z_channels != spec.channels:
            raise ValueError(
                f"project: false leaves {spec.channels} channels, not z_channels: {z_channels}; drop one of them"
            )
        self.channels = spec.channels
        self.range = Signed() if range == "signed" else None
        self.post_quant_conv = nn.Conv2d(spec.channels, z_channels, 1) if project else None
        widths, last = shape.widths, shape.levels[-1]
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], groups)
        self.up = nn.ModuleList(
            Level(
                widths[min(level + 1, last)], widths[level], blocks + 1, groups,
                shape.attends[level], "upsample" if level else "",
            )
            for level in shape.levels
        )  # fmt: skip
        self.norm_out = nn.GroupNorm(groups, widths[0], EPS)
        self.conv_out = nn.Conv2d(widths[0], spec.signal_channels, 3, padding=1)

    @property
    def anchors(self) -> Mapping[str, nn.Parameter]:
        """``last``: the weight that makes pixels."""
        return {"last": cast(nn.Parameter, self.conv_out.weight)}

    def forward(
        self, z: Tensor, *, want: frozenset[str] = frozenset({"decoded"}), clock: Clock | None = None
    ) -> dict[str, Tensor]:
        """Latents z (B, C, h, w); arguments as in :class:`vtp_plugins.protocols.Decoder`."""
        if z.ndim != 4 or z.shape[1] != self.channels:
            raise ValueError(f"the decoder reads (B, {self.channels}, h, w), not {tuple(z.shape)}")
        for output in want - {"decoded"}:
            raise StackFault(f"decoder ldm_cnn has no output {output!r}; it gives decoded")
        h = self.mid(self.conv_in(z if self.post_quant_conv is None else self.post_quant_conv(z)))
        for level in reversed(self.up):
            h = level(h)
        x: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return {"decoded": x if self.range is None else self.range.left(x)}

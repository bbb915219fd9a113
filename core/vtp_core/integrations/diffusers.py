"""A tokenizer of ours as an autoencoder of diffusers: ``AutoencoderVTP``, for ``vtp export RUN --format diffusers``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from vtp_core.build import blueprint, tokenizer_only
from vtp_core.converting.values import not_finite
from vtp_core.errors import StackFault
from vtp_core.export import foreign_config
from vtp_core.export.diffusers_reading import check_images, shapes_of, statistics_of
from vtp_core.nn.chunked import wide
from vtp_core.official.hub import offline
from vtp_core.stack import check_stack
from vtp_plugins.importing import Mismatch, refuse
from vtp_plugins.registry import Registry

try:
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.models.autoencoders.vae import (
        AutoencoderMixin,
        DecoderOutput,
        DiagonalGaussianDistribution,
        IdentityDistribution,
    )
    from diffusers.models.modeling_utils import ModelMixin
    from diffusers.utils import BaseOutput
    from diffusers.utils.accelerate_utils import apply_forward_hook
except ImportError as error:
    raise ImportError(
        f"{error}; AutoencoderVTP needs diffusers: pip install 'vtp-plugins[diffusers]'"
    ) from error


@dataclass
class Encoded(BaseOutput):  # type: ignore[misc]  # diffusers' classes are Any to mypy
    """What ``encode`` gives.

    Attributes:
        latent: (B, C, h, w), standardised; the mean where there is a posterior.
        latent_dist: the posterior, standardised likewise; of a tokenizer that has none, the latent itself, whose
            ``sample()`` and ``mode()`` are the same.
    """

    latent: Tensor
    latent_dist: Any = None


class AutoencoderVTP(ModelMixin, AutoencoderMixin, ConfigMixin):  # type: ignore[misc]
    """Encoder, bottleneck and decoder of a stack, with the surface of diffusers' autoencoders.

    Images are (B, 3, H, W) in [-1, 1]; sides are multiples of the patch. Latents are standardised inside ``encode``
    and ``decode``, so that ``scaling_factor``, by which pipelines divide, is 1.

    Args:
        stack: sections ``modality``, ``size``, ``encoder``, ``bottleneck``, ``decoder``; names mean what is installed.
        scaling_factor: 1.
        latents_mean: by channel, or by channel and place; None leaves latents raw.
        latents_std: likewise.
        provenance: where the weights come from; kept, not used.
    """

    _supports_gradient_checkpointing = False
    _no_split_modules = ("Block",)

    encoder: Any
    bottleneck: Any
    decoder: Any

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        stack: dict[str, Any],
        scaling_factor: float = 1.0,
        latents_mean: list[Any] | None = None,
        latents_std: list[Any] | None = None,
        provenance: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        given = {
            "_class_name": foreign_config.CLASS, "stack": stack, "scaling_factor": scaling_factor,
            "latents_mean": latents_mean, "latents_std": latents_std, "provenance": provenance or {},
        }  # fmt: skip
        config = foreign_config.checked(given, "AutoencoderVTP")
        model = tokenizer_only(blueprint(check_stack(foreign_config.CLASS, dict(config.stack), Registry())))
        check_images(model)
        if model.decoder is None:
            raise StackFault("AutoencoderVTP: the stack has no decoder")
        model.statistics = statistics_of(config, model.spec, "AutoencoderVTP")
        for name, module in model.tokenizer_modules().items():
            self.add_module(name, module)
        self._built, self.spec = model, model.spec
        self.use_slicing = False
        self.register_to_config(**shapes_of(model.spec))

    # ---- loading

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """As diffusers', but for what is not known here: ``auto_map``, ``quantization_config`` and others are dropped.

        Raises:
            DataFault: the configuration is of another class, or a field has a wrong value.
        """
        found = super().load_config(*args, **kwargs)
        tree, *rest = found if isinstance(found, tuple) else (found,)
        where = f"{args[0] if args else foreign_config.CLASS}/{foreign_config.FILE}"
        known = foreign_config.checked(tree, where).model_dump(by_alias=True, exclude_none=True)
        return (known, *rest) if rest else known

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As diffusers', from safetensors only; every tensor must be there and finite.

        Raises:
            DataFault: the configuration is broken or of another class.
            Mismatch: tensors are missing, unexpected, of another shape or not finite.
            ValueError: ``use_safetensors=False``, which would read a pickle.
        """
        if kwargs.pop("use_safetensors", True) is False:
            raise ValueError("use_safetensors: AutoencoderVTP reads safetensors only; leave it out")
        told = kwargs.pop("output_loading_info", False)
        if offline():
            kwargs["local_files_only"] = True
        place = pretrained_model_name_or_path
        try:
            model, info = super().from_pretrained(
                place, use_safetensors=True, output_loading_info=True, **kwargs
            )
        except RuntimeError as error:
            if "size mismatch" not in str(error):
                raise
            raise Mismatch(f"{place}: the weights do not fit its config.json\n{_first(error)}") from error
        names = {kind: info[f"{kind}_keys"] for kind in ("missing", "unexpected")}
        refuse({kind: dict.fromkeys(found, "") for kind, found in names.items()})
        tensors = model.state_dict()
        refuse({"not finite": not_finite(tensors)})
        model.load_state_dict(
            tensors
        )  # diffusers fills modules one by one; this tells them that all have come
        return (model, info) if told else model

    # ---- the surface of an autoencoder

    @apply_forward_hook  # type: ignore[untyped-decorator]
    def encode(self, x: Tensor, return_dict: bool = True) -> Encoded | tuple[Tensor]:
        """Images in [-1, 1] to latents (B, C, h, w); ``return_dict=False`` gives the latent alone, in a tuple."""
        parts = x.split(1) if self.use_slicing and len(x) > 1 else [x]
        found = [self._encode(part) for part in parts]
        latent = torch.cat([z for z, _ in found])
        if not return_dict:
            return (latent,)
        spreads = [spread for _, spread in found if spread is not None]
        if not spreads:
            return Encoded(latent=latent, latent_dist=IdentityDistribution(latent))
        moments = torch.cat([latent, torch.cat(spreads)], dim=1)
        return Encoded(latent=latent, latent_dist=DiagonalGaussianDistribution(moments))

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Latent, and log-variance of its posterior where it has one, both standardised."""
        read = self._built.modality.normalise(wide(x) / 2 + 0.5).to(x.dtype)
        tokens = self.encoder(read, want={"patches": len(read)})["patches"]
        made = self.bottleneck(tokens)
        grid = tuple(side // patch for side, patch in zip(x.shape[2:], self.spec.patch, strict=True))
        z = self._built.standardise(wide(_gridded(made["carried"], grid)))
        mean, spread = made.get("posterior", (None, None))
        if mean is None or mean is not made["latent"]:  # a link behind the posterior changed its space
            return z.to(x.dtype), None
        std = self._built.statistics.get("std", torch.ones(self.spec.channels)).to(z)
        std = std.view(*std.shape, *[1] * (z.ndim - 1 - std.ndim))  # (C,) -> (C, 1, 1)
        return z.to(x.dtype), (wide(_gridded(spread, grid)) - 2 * std.log()).to(x.dtype)

    @apply_forward_hook  # type: ignore[untyped-decorator]
    def decode(self, z: Tensor, return_dict: bool = True, generator: Any = None) -> Any:
        """Latents to images around [-1, 1], not clamped; ``generator`` is for diffusers' sake."""
        parts = z.split(1) if self.use_slicing and len(z) > 1 else [z]
        sample = torch.cat([self._decode(part) for part in parts])
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def _decode(self, z: Tensor) -> Tensor:
        raw = self._built.restore(wide(z)).to(z.dtype)
        shown = self._built.modality.to_display(wide(self.decoder(raw)["decoded"]))
        return (2 * shown - 1).to(z.dtype)  # type: ignore[no-any-return]

    def forward(
        self, sample: Tensor, sample_posterior: bool = False, return_dict: bool = True, generator: Any = None
    ) -> Any:
        """Images through both; ``sample_posterior`` draws the latent where it has a posterior."""
        posterior = self.encode(sample).latent_dist
        z = posterior.sample(generator=generator) if sample_posterior else posterior.mode()
        return self.decode(z, return_dict=return_dict)

    def enable_tiling(self) -> NoReturn:
        """Refuse: a network that sees the whole picture makes another latent of its parts.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "AutoencoderVTP has no tiling: attention and norms go over the whole picture, so that tiles would give "
            "another latent and another picture; enable_slicing() saves memory"
        )


def _first(error: Exception) -> str:
    """What torch says of the first tensors."""
    return "\n".join([line.strip() for line in str(error).splitlines() if "size mismatch" in line][:6])


def _gridded(x: Tensor, grid: tuple[int, ...]) -> Tensor:
    z: Tensor = x.transpose(1, 2).unflatten(2, grid)  # (B, N, C) -> (B, C, h, w)
    return z

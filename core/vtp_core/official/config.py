"""``config.json`` of a VTP directory: untrusted, so only known fields are read, each of its type and in bounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from vtp_core.errors import DataFault

MODEL_TYPE = "vtp"
FILE = "config.json"
PATCH = 16
"""Pixels that the release's decoder draws a token with; its config has no field for it."""
MLP_RATIO = 4.0
"""Of the release's decoder, which has no field for it either."""
_MAX_BYTES = 1 << 16


def _whole(value: Any) -> Any:
    """True is no number, though Python says so."""
    if isinstance(value, bool):
        raise ValueError("a number is wanted")
    return value


Count = Annotated[int, BeforeValidator(_whole), Field(strict=True, gt=0, le=1 << 20)]
Depth = Annotated[int, BeforeValidator(_whole), Field(strict=True, gt=0, le=1024)]
Number = Annotated[float, BeforeValidator(_whole), Field(ge=-1e6, le=1e6)]
Ratio = Annotated[float, BeforeValidator(_whole), Field(gt=0, le=64)]
Flag = Annotated[bool, Field(strict=True)]
Word = Annotated[str, Field(strict=True, max_length=64)]
Ffn = Literal["swiglu", "swiglu32", "swiglu64", "swiglu128", "mlp"]
Norm = Literal["rmsnorm", "layernorm", "layernormbf16"]


class Config(BaseModel):
    """Fields of the release's ``VTPConfig`` with its defaults, and ours at the end.

    The release's text tower has switches that change what it computes and that no published file uses; those
    are refused, not ignored.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False, protected_namespaces=())

    model_type: Literal["vtp"]
    image_size: Count = 256
    train_clip: Flag = True
    train_reconstruction: Flag = True

    vision_patch_size: Count = 16
    vision_embed_dim: Count = 768
    vision_depth: Depth = 12
    vision_num_heads: Count = 12
    vision_mlp_ratio: Ratio = 4.0
    vision_ffn_layer: Ffn = "swiglu"
    vision_norm_layer: Norm = "rmsnorm"
    vision_init_values: Number | None = None
    vision_use_qk_norm: Flag = False
    vision_feature_bottleneck: Count = 64
    vision_bottleneck_ae_only: Flag = True
    vision_clip_feat: Literal["cls", "pooled"] = "cls"

    text_context_length: Count = 77
    text_vocab_size: Count = 49408
    text_embed_dim: Count = 768
    text_num_heads: Count = 12
    text_depth: Depth = 12
    text_mlp_ratio: Ratio = 4.0
    text_ls_init_value: Number | None = None
    text_embed_cls: Literal[False] = False
    text_pad_id: int = 0
    text_no_causal_mask: Literal[False] = False
    text_pool_type: Literal["argmax"] = "argmax"
    text_proj_type: Literal["linear"] = "linear"
    text_proj_bias: Flag = False
    text_output_tokens: Flag = False
    text_quick_gelu: Flag = False

    decoder_embed_dim: Count = 768
    decoder_num_heads: Count = 12
    decoder_depth: Depth = 12
    decoder_ffn_layer: Ffn = "swiglu"
    decoder_norm_layer: Norm = "layernorm"
    decoder_init_values: Number | None = None
    decoder_use_qk_norm: Flag = False

    init_logit_scale: Number | None = None
    init_logit_bias: Number | None = None
    nonscalar_logit_scale: Flag = False

    # what a loader of the release writes beside its own fields
    architectures: Annotated[list[Word], Field(max_length=8)] | None = None
    dtype: Word | None = None
    torch_dtype: Word | None = None
    transformers_version: Word | None = None

    # ours: absent means bfloat16, which is what the release computes
    rope_dtype: Literal["bfloat16", "float32"] = "bfloat16"

    @property
    def bottleneck(self) -> bool:
        """Whether there is a matrix; a bottleneck as wide as the features has none."""
        return self.vision_feature_bottleneck != self.vision_embed_dim

    @property
    def joint_width(self) -> int:
        """Width of what is projected for CLIP."""
        return self.vision_embed_dim if self.vision_bottleneck_ae_only else self.vision_feature_bottleneck

    def fields(self) -> dict[str, Any]:
        """What ``config.json`` holds, sorted as the release writes it; our own field only where it says something."""
        unset = {key for key in ("architectures", "dtype", "torch_dtype", "transformers_version")
                 if getattr(self, key) is None}  # fmt: skip
        unset |= {"rope_dtype"} if self.rope_dtype == "bfloat16" else set()
        return dict(sorted(self.model_dump(exclude=unset).items()))

    def text(self) -> str:
        """The file."""
        return json.dumps(self.fields(), indent=2, sort_keys=True) + "\n"


def is_official(path: Path) -> bool:
    """Whether a directory is laid out like a VTP release rather than like a run of ours."""
    return (path / FILE).is_file() and not (path / "stack.yaml").exists()


def read_config(path: Path) -> Config:
    """``config.json`` of a directory.

    Raises:
        DataFault: it is missing, too large, no JSON, of another model, or a field has a wrong value.
    """
    file = path / FILE
    try:
        with file.open("rb") as stream:
            raw = stream.read(_MAX_BYTES + 1)
        if len(raw) > _MAX_BYTES:
            raise ValueError(f"it is larger than {_MAX_BYTES:,} bytes")
        tree = json.loads(raw.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise DataFault(f"{file} cannot be read: {why}") from error
    found = tree.get("model_type") if isinstance(tree, dict) else None
    if found != MODEL_TYPE:
        raise DataFault(
            f"{file} has model_type {str(found)[:64]!r}: this is no directory of VTP, a run or an export of ours"
        )
    try:
        return Config.model_validate(tree)
    except pydantic.ValidationError as error:
        wrong = [f"{'.'.join(map(str, e['loc'][:1]))}: {e['msg']}, not {str(e['input'])[:64]!r}"
                 for e in error.errors(include_url=False)]  # fmt: skip
        raise DataFault(f"{file}: " + "; ".join(wrong[:6])) from error

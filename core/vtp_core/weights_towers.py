"""The table of published towers by their names in timm and open_clip; people bring these files themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Library = Literal["timm", "open_clip"]


@dataclass(frozen=True, slots=True)
class Tower:
    """One published network, as a file in the layout of the library that names it.

    Attributes:
        library: whose name it is.
        group: of the listing.
        hub: repository on the Hugging Face hub.
        licence: of the weights.
        size: bytes of its tensors in float32.
        original: name of the authors' own file, which is read as well; empty where it has another layout.
        original_sha256: of that file, whole, or its beginning where no more is published.
    """

    library: Library
    group: str
    hub: str
    licence: str
    size: int
    original: str = ""
    original_sha256: str = ""

    @property
    def file(self) -> str:
        """Name of the file in the repository."""
        return "model.safetensors" if self.library == "timm" else "open_clip_model.safetensors"


def _timm(
    group: str, licence: str, sizes: Mapping[str, int], originals: Mapping[str, tuple[str, str]] | None = None
) -> dict[str, Tower]:
    """Rows of one family: name -> bytes, and name -> the authors' file with its hash."""
    return {
        name: Tower("timm", group, f"timm/{name}", licence, size, *(originals or {}).get(name, ()))
        for name, size in sizes.items()
    }


def _open_clip(group: str, licence: str, rows: Mapping[str, tuple[str, int]]) -> dict[str, Tower]:
    return {name: Tower("open_clip", group, hub, licence, size) for name, (hub, size) in rows.items()}


_DINOV2 = {
    "vit_small_patch14_dinov2.lvd142m": 88_224_768,
    "vit_base_patch14_dinov2.lvd142m": 346_318_848,
    "vit_large_patch14_dinov2.lvd142m": 1_217_470_464,
    "vit_giant_patch14_dinov2.lvd142m": 4_545_916_928,
    "vit_small_patch14_reg4_dinov2.lvd142m": 88_229_376,
    "vit_base_patch14_reg4_dinov2.lvd142m": 346_328_064,
    "vit_large_patch14_reg4_dinov2.lvd142m": 1_217_482_752,
    "vit_giant_patch14_reg4_dinov2.lvd142m": 4_545_935_360,
}
# Every hash below stands in at least two independent public lists of this file.
_DINOV2_ORIGINALS = {
    "vit_small_patch14_dinov2.lvd142m": (
        "dinov2_vits14_pretrain.pth", "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9",
    ),
    "vit_base_patch14_dinov2.lvd142m": (
        "dinov2_vitb14_pretrain.pth", "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73",
    ),
    "vit_large_patch14_dinov2.lvd142m": (
        "dinov2_vitl14_pretrain.pth", "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
    ),
    "vit_giant_patch14_dinov2.lvd142m": (
        "dinov2_vitg14_pretrain.pth", "baf8467e50af277596bbbafa06887c177ee899ab46033649c383577d7e9309d3",
    ),
    "vit_small_patch14_reg4_dinov2.lvd142m": (
        "dinov2_vits14_reg4_pretrain.pth", "f433177089a681826f849f194ece3bb48f4d63fb38d32fc837e3dc7a4e5641fb",
    ),
    "vit_base_patch14_reg4_dinov2.lvd142m": (
        "dinov2_vitb14_reg4_pretrain.pth", "73182a088cf94833c94b1666d1c99e02fe87e2007bff57b564fb6206e25dba71",
    ),
    "vit_large_patch14_reg4_dinov2.lvd142m": (
        "dinov2_vitl14_reg4_pretrain.pth", "36e4deffbaef061a2576705b0c36f93621e2ae20bf6274694821b0b492551b51",
    ),
    "vit_giant_patch14_reg4_dinov2.lvd142m": (
        "dinov2_vitg14_reg4_pretrain.pth", "746ecb8c6301c645c5c855be91687d274587d6e48fdaec4a729753160b34a283",
    ),
}  # fmt: skip
_DINOV3 = {
    "vit_small_patch16_dinov3.lvd1689m": 86_347_776,
    "vit_small_plus_patch16_dinov3.lvd1689m": 114_733_056,
    "vit_base_patch16_dinov3.lvd1689m": 342_564_864,
    "vit_large_patch16_dinov3.lvd1689m": 1_212_317_696,
    "vit_huge_plus_patch16_dinov3.lvd1689m": 3_362_037_760,
    "vit_7b_patch16_dinov3.lvd1689m": 26_864_123_904,
}
# Of these the authors publish the first eight digits, in the file's name.
_DINOV3_ORIGINALS = {
    "vit_small_patch16_dinov3.lvd1689m": (
        "dinov3_vits16_pretrain_lvd1689m-08c60483.pth",
        "08c60483bc63c04f533611e34bf70b120eedb7240f469bc16e9e20bf344b941d",
    ),
    "vit_small_plus_patch16_dinov3.lvd1689m": (
        "dinov3_vits16plus_pretrain_lvd1689m-4057cbaa.pth",
        "4057cbaaad8c16657adb09d6815f28d4164eeba30532fde23f0d17313124caea",
    ),
    "vit_base_patch16_dinov3.lvd1689m": (
        "dinov3_vitb16_pretrain_lvd1689m-73cec8be.pth",
        "73cec8be7427c8655ceced13ce62f6e20a1fa90d1b4d4a550df17a1144081a7c",
    ),
    "vit_large_patch16_dinov3.lvd1689m": (
        "dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth",
        "8aa4cbddda325040fc78db2c272754af6ebe8ff2c55f6ec4f1964d8890f66035",
    ),
    "vit_huge_plus_patch16_dinov3.lvd1689m": (
        "dinov3_vith16plus_pretrain_lvd1689m-7c1da9a5.pth", "7c1da9a5",
    ),
    "vit_7b_patch16_dinov3.lvd1689m": ("dinov3_vit7b16_pretrain_lvd1689m-a955f4ea.pth", "a955f4ea"),
}  # fmt: skip
_SIGLIP2 = {
    "vit_base_patch16_siglip_224.v2_webli": 371_536_896,
    "vit_base_patch16_siglip_256.v2_webli": 371_721_216,
    "vit_base_patch16_siglip_384.v2_webli": 372_704_256,
    "vit_base_patch16_siglip_512.v2_webli": 374_080_512,
    "vit_large_patch16_siglip_256.v2_webli": 1_263_824_896,
    "vit_large_patch16_siglip_384.v2_webli": 1_265_135_616,
    "vit_large_patch16_siglip_512.v2_webli": 1_266_970_624,
    "vit_so400m_patch14_siglip_224.v2_webli": 1_710_722_816,
    "vit_so400m_patch14_siglip_378.v2_webli": 1_712_902_400,
    "vit_so400m_patch16_siglip_256.v2_webli": 1_711_552_256,
    "vit_so400m_patch16_siglip_384.v2_webli": 1_713_026_816,
    "vit_so400m_patch16_siglip_512.v2_webli": 1_715_091_200,
}
_MAE = {
    "vit_base_patch16_224.mae": 343_194_624,
    "vit_large_patch16_224.mae": 1_213_206_528,
    "vit_huge_patch14_224.mae": 2_523_059_200,
}
_CLIP = {
    "ViT-B-32-quickgelu.openai": ("timm/vit_base_patch32_clip_224.openai", 605_109_252),
    "ViT-B-16-quickgelu.openai": ("timm/vit_base_patch16_clip_224.openai", 598_482_948),
    "ViT-L-14-quickgelu.openai": ("timm/vit_large_patch14_clip_224.openai", 1_710_466_052),
    "ViT-L-14-336-quickgelu.openai": ("timm/vit_large_patch14_clip_336.openai", 1_711_776_772),
    "ViT-B-32.laion2b_s34b_b79k": ("laion/CLIP-ViT-B-32-laion2B-s34B-b79K", 605_109_252),
    "ViT-B-16.laion2b_s34b_b88k": ("laion/CLIP-ViT-B-16-laion2B-s34B-b88K", 598_482_948),
    "ViT-L-14.laion2b_s32b_b82k": ("laion/CLIP-ViT-L-14-laion2B-s32B-b82K", 1_710_466_052),
    "ViT-H-14.laion2b_s32b_b79k": ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", 3_944_437_764),
}
_SIGLIP2_BOTH = {
    "ViT-B-16-SigLIP2.webli": ("timm/ViT-B-16-SigLIP2", 1_500_751_880),
    "ViT-B-16-SigLIP2-256.webli": ("timm/ViT-B-16-SigLIP2-256", 1_500_936_200),
    "ViT-B-16-SigLIP2-384.webli": ("timm/ViT-B-16-SigLIP2-384", 1_501_919_240),
    "ViT-B-16-SigLIP2-512.webli": ("timm/ViT-B-16-SigLIP2-512", 1_503_295_496),
    "ViT-L-16-SigLIP2-256.webli": ("timm/ViT-L-16-SigLIP2-256", 3_526_107_144),
    "ViT-L-16-SigLIP2-384.webli": ("timm/ViT-L-16-SigLIP2-384", 3_527_417_864),
    "ViT-L-16-SigLIP2-512.webli": ("timm/ViT-L-16-SigLIP2-512", 3_529_252_872),
    "ViT-SO400M-14-SigLIP2.webli": ("timm/ViT-SO400M-14-SigLIP2", 4_541_854_408),
    "ViT-SO400M-14-SigLIP2-378.webli": ("timm/ViT-SO400M-14-SigLIP2-378", 4_544_033_992),
    "ViT-SO400M-16-SigLIP2-256.webli": ("timm/ViT-SO400M-16-SigLIP2-256", 4_542_683_848),
    "ViT-SO400M-16-SigLIP2-384.webli": ("timm/ViT-SO400M-16-SigLIP2-384", 4_544_158_408),
    "ViT-SO400M-16-SigLIP2-512.webli": ("timm/ViT-SO400M-16-SigLIP2-512", 4_546_222_792),
}

TOWERS: dict[str, Tower] = {
    **_timm("DINOv2 (timm)", "apache-2.0", _DINOV2, _DINOV2_ORIGINALS),
    **_timm("DINOv3 (timm)", "dinov3-license", _DINOV3, _DINOV3_ORIGINALS),
    **_timm("SigLIP 2, image tower (timm)", "apache-2.0", _SIGLIP2),
    **_timm("MAE (timm)", "cc-by-nc-4.0", _MAE),
    **_open_clip("CLIP, both towers (open_clip)", "mit", _CLIP),
    **_open_clip("SigLIP 2, both towers (open_clip)", "apache-2.0", _SIGLIP2_BOTH),
}

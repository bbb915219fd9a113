"""What README and CONTRIBUTING show exists and runs."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from distributions import ROOT

Vtp = Callable[..., subprocess.CompletedProcess[str]]

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "plugins").glob("*/README.md"))]
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def shown(page: Path, program: str) -> set[str]:
    """First arguments that the page's consoles give to a program."""
    consoles = "\n".join(blocks("console", page.read_text(encoding="utf-8")))
    return set(re.findall(rf"^\$ {program} ([a-z-]+)", consoles, flags=re.MULTILINE))


def test_the_first_screen_shows_demo_and_test() -> None:
    screen = "\n".join(README.splitlines()[:20])
    assert "$ make demo" in screen
    assert "$ make test" in screen


@pages
def test_commands_exist(page: Path, vtp: Vtp) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in shown(page, "make"):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    told = vtp("--help").stdout
    for verb in shown(page, "vtp"):
        assert re.search(rf"\b{verb}\b", told), f"vtp {verb} is not in vtp --help"


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_the_stack_of_the_readme_plans(tmp_path: Path, vtp: Vtp) -> None:
    (tmp_path / "readme.yaml").write_text(blocks("yaml", README)[0], encoding="utf-8")
    planned = vtp("plan", "readme.yaml")
    assert planned.returncode == 0, planned.stderr


def test_the_objective_of_the_readme_works() -> None:
    import torch

    from vtp_core.clock import StepClock
    from vtp_plugins import Outputs, Spec

    source = next(block for block in blocks("python", README) if "class Mine" in block)
    names: dict[str, object] = {}
    exec(source, names)
    objective = names["Mine"](Spec(width=4))  # type: ignore[operator]
    cls = torch.eye(4).reshape(2, 2, 4).requires_grad_()  # two crops of two images, all at right angles
    loss = objective({"student": Outputs({"cls": cls})}, StepClock())["spread"]
    assert loss.item() == pytest.approx(1.0)
    loss.backward()
    assert cls.grad is not None


def test_the_names_in_the_python_example_exist() -> None:
    import vtp_core

    example = next(block for block in blocks("python", README) if "from vtp_core" in block)
    compile(example, "README.md", "exec")
    for name in ("Tokenizer", "load_stack", "plan", "train"):
        assert hasattr(vtp_core, name)
    for name in set(re.findall(r"\btok\.(\w+)", example)):
        assert hasattr(vtp_core.Tokenizer, name), name


@pytest.mark.parametrize("file", ["README.md", "Makefile"])
def test_packages_that_carry_weights_are_the_ones_of_the_table(file: str) -> None:
    from vtp_core.weights_table import TABLE

    text = (ROOT / file).read_text(encoding="utf-8")
    for name in ("lpips-alex", "lite0"):
        assert TABLE[name].requirement in text
        assert name in text


def test_numbers_have_a_place_that_a_script_writes() -> None:
    start, end = README.index("<!-- numbers:start -->"), README.index("<!-- numbers:end -->")
    assert start < end

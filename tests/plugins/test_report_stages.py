"""The report of whole runs after the tokenizer's: a generator's by label and by text, and a decoder's."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from small import write_stack

from vtp_core import load_stack, train
from vtp_plugins.registry import Registry
from vtp_plugins.spec import Spec
from vtp_report import Report

PAYLOADS = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</td><iframe src=x>",
    "{{ 7 * 7 }}",
)
REST = ["~objectives.dino", "~objectives.ibot", "~objectives.koleo", "train.steps=2"]
GENERATOR = """
size: tiny
data: {use: emoji, batch_size: 8, workers: 0}
tokenizer: {frozen: [encoder, bottleneck, decoder]}
generator:
  {use: lightningdit, width: 32, depth: 1, heads: 2, path: {use: linear}, condition: label, drop_condition: 0.2}
sampler: {use: euler, steps: 2, guidance: {scale: 2.0}}
objectives: {flow: {cosine: 1.0}}
train: {steps: 2, seed: 0}
"""
DECODER = """
size: tiny
data: {use: emoji, batch_size: 8, workers: 0}
tokenizer: {frozen: [encoder, bottleneck]}
objectives: {reconstruction: {lpips: 0.0}}
train: {steps: 2, seed: 0, optim: {lr: 1.0e-2}}
"""


class Page(HTMLParser):
    """Tags, names of attributes and text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


def trained(folder: Path, text: str, *changes: str) -> Path:
    (folder / "stack.yaml").write_text(text)
    return train(load_stack(folder / "stack.yaml", [f"run.dir={folder / 'run'}", *changes])).path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    return train(load_stack(write_stack(folder), [*REST, f"run.dir={folder / 'run'}"])).path


@pytest.fixture(scope="module")
def generator(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("generator"), GENERATOR, f"tokenizer.from={tokenizer}")


def report(run: Path, **options: object) -> str:
    few: dict[str, object] = {"samples": 2, "labels": 2, "frames": 3, "questions": 2, "draws": 2}
    return Report(Spec(), **{**few, **options}).vtp_finish(run, Registry()).read_text(encoding="utf-8")  # type: ignore[arg-type]


def shown(html: str, section: str) -> str:
    found = re.search(rf'<section id="{section}">.*?</section>', html, flags=re.DOTALL)
    assert found is not None
    return found[0]


def test_the_page_of_a_generator_shows_samples_and_strips_and_its_tokenizer(
    generator: Path, tokenizer: Path
) -> None:
    html = report(generator)
    for section in ("samples", "strips", "reconstructions", "components"):
        assert 'class="note"' not in shown(html, section)
    assert not re.search(r'id="(neighbours|zero-shot|before)"', html)
    assert shown(html, "samples").count("<img") == 2 * (2 + 2 + 2)
    assert shown(html, "strips").count("<img") == 2 * 3
    text = " ".join(Page(html).text.split())
    for words in (
        "without guidance: euler, steps 2, student weights · 2 forwards per sample",
        "guided: euler, steps 2, guidance scale 2.0, student weights · 2 forwards",
        f"tokenizer from {tokenizer}",
        "flow/mse",
        "flow/cosine",
        "From country flag to person role",
    ):
        assert words in text
    assert not Page(html).tags & {"script", "link", "iframe"}
    assert len(html) < 3e6
    assert html == report(generator)


def test_a_generator_of_captions_is_asked_for_captions(tokenizer: Path, tmp_path: Path) -> None:
    run = trained(tmp_path, GENERATOR, f"tokenizer.from={tokenizer}", "generator.condition=text")
    html = report(run, labels=("a red flag", "a cat"))
    assert "From a red flag to a cat" in shown(html, "strips")
    assert "Noise and captions go along the sphere." in shown(html, "strips")
    assert shown(html, "samples").count("<img") == 2 * (
        2 + 2
    )  # no image is known of a caption that is made up
    assert shown(report(run), "samples").count("<img") == 2 * (2 + 2 + 2)


def test_without_guidance_and_without_condition_there_are_plain_samples(
    tokenizer: Path, tmp_path: Path
) -> None:
    changes = ["generator.condition=null", "generator.drop_condition=0", "sampler.guidance=null"]
    html = report(trained(tmp_path, GENERATOR, f"tokenizer.from={tokenizer}", *changes))
    assert shown(html, "samples").count("<img") == 2 * (2 + 2)
    assert ">guided<" not in html
    assert "two labels or captions are needed" in shown(html, "strips")
    assert shown(html, "strips").count("<img") == 3  # from noise to noise


def test_a_run_on_latents_shows_the_images_behind_them(tokenizer: Path, tmp_path: Path) -> None:
    from vtp_core.latents.writer import write_latents

    write_latents(tokenizer, tmp_path / "latents", flip=False)
    data = ["data.use=latents", f"data.path={tmp_path / 'latents'}", f"tokenizer.from={tokenizer}"]
    html = report(trained(tmp_path, GENERATOR, *data))
    for section in ("samples", "strips", "reconstructions", "components"):
        assert 'class="note"' not in shown(html, section)
    assert shown(html, "samples").count("<img") == 2 * (2 + 2 + 2)


def test_names_are_quoted_and_a_fault_costs_its_sections_alone(generator: Path, tmp_path: Path) -> None:
    run = shutil.copytree(generator, tmp_path / "run")
    names = json.loads((run / "names.json").read_text())
    names["label"] = [PAYLOADS[i % len(PAYLOADS)] for i in range(len(names["label"]))]
    (run / "names.json").write_text(json.dumps(names))
    page = Page(report(run, labels=("0", "1", "2", "3")))
    assert all(payload in page.text for payload in PAYLOADS)
    assert not page.tags & {"script", "iframe"}
    assert not [name for name in page.attributes if name.startswith("on")]
    html = report(run, labels=("no such thing",))
    assert "Nothing could be sampled: StackFault: no label" in shown(html, "samples")
    assert 'class="note"' not in shown(html, "reconstructions")


def test_the_page_of_a_later_stage_shows_before_and_after(tokenizer: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tokenizer, tmp_path / "source")
    run = trained(tmp_path, DECODER, f"tokenizer.from={source}")
    html = report(run, samples=4)
    assert shown(html, "before").count("<img") == 2 * 4
    psnr = re.findall(r"(before|after), (-?[\d.]+) dB", shown(html, "before"))
    assert [word for word, _ in psnr] == ["before", "after"] * 2
    assert "trained on decoder" in " ".join(shown(html, "before").replace("This stage ", "").split())
    assert 'id="neighbours"' in html
    assert 'id="samples"' not in html
    shutil.rmtree(source)
    assert f"no longer at {source}" in shown(report(run), "before")


def test_the_page_of_a_tokenizer_from_nothing_has_none_of_it(tokenizer: Path) -> None:
    html = report(tokenizer)
    assert not re.search(r'id="(samples|strips|before)"', html)
    assert ".closeup" not in html
    assert "tokenizer from" not in html

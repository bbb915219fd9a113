"""The report: complete from a whole run, honest about what is missing, and deaf to what is quoted in it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pluggy
import pytest
import torch
from torch import Tensor

from vtp_plugins.hookspecs import Hooks
from vtp_plugins.registry import Registry
from vtp_plugins.spec import Spec
from vtp_report import Report
from vtp_report.components import principal_colours
from vtp_report.matches import Relation
from vtp_report.neighbours import neighbours
from vtp_report.pictures import picture
from vtp_report.reconstructions import reconstructions
from vtp_report.record import AbsentError, read
from vtp_report.zero_shot import zero_shot

SIDE, COLOURS = 16, 6
SECTIONS = ("curves", "reconstructions", "components", "neighbours", "zero-shot", "numbers", "run")
PAYLOADS = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'><svg onload=alert(1)>",
    "</style></pre><iframe src=https://evil.example>",
    "{{ 7 * 7 }}{% raw %}",
    "javascript:alert(1)//",
    "]]><!--",
    "&lt;b&gt; &amp; $\\frac{1}{2}$",
)


class Colours:
    """A bench: plain colours, one concept per colour, two styles of brightness."""

    splits = ("train", "unseen_style")
    device = torch.device("cpu")

    def __init__(self, captions: list[str] | None = None) -> None:
        self.captions = captions or [f"colour {i}" for i in range(COLOURS)]

    def dataset(self, split: str) -> Any:
        return range(COLOURS)

    def images(self, split: str) -> Iterator[Tensor]:
        hues = torch.eye(3).repeat(2, 1) * torch.tensor([1.0, 1.0, 1.0, 0.5, 0.5, 0.5])[:, None]  # (6, 3)
        ramp = torch.linspace(0.8, 1, SIDE).expand(SIDE, SIDE)
        images = hues[:, :, None, None] * ramp * (1.0 if split == "train" else 0.9)  # (6, 3, 16, 16)
        yield images[:4]
        yield images[4:]

    def reconstructions(self, split: str) -> Iterator[tuple[Tensor, Tensor]]:
        raise AssertionError("the report decodes only what it shows")

    def features(self, split: str) -> dict[str, Any]:
        cls = torch.eye(COLOURS) + 0.01
        numbers = list(range(COLOURS))
        return {
            "cls": cls,
            "text": self.captions,
            "concept": numbers,
            "label": [i // 3 for i in numbers],
            "style": [0] * 6,
        }


class Blur:
    """A tokenizer whose latent is the mean of every 8 x 8 patch."""

    def encode(self, images: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(images, 8)

    def decode(self, z: Tensor) -> Tensor:
        return torch.nn.functional.interpolate(z, scale_factor=8.0)

    def features(self, images: Tensor) -> Any:
        return SimpleNamespace(patches=self.encode(images).flatten(2).transpose(1, 2), grid=(2, 2))

    def embed_image(self, images: Tensor) -> Tensor:
        return torch.nn.functional.normalize(images.mean((2, 3)) - images.mean() / 3, dim=-1)

    def embed_text(self, texts: list[str]) -> Tensor:
        return torch.nn.functional.normalize(torch.eye(3).repeat(2, 1)[: len(texts)] + 0.1, dim=-1)


def row(
    probe: str, split: str, value: float, step: int = 20, protocol: str = "a protocol", n: int = 6
) -> dict[str, Any]:
    return {"step": step, "probe": probe, "split": split, "value": value, "n": n, "protocol": protocol}


READINGS = [
    *(row("reconstruction/psnr", "train", 20 + at, at) for at in (10, 20)),
    row("reconstruction/psnr", "unseen_style", 18.5),
    row(
        "zero_shot/text_to_image_top1",
        "unseen_style",
        0.15,
        protocol="1,667 captions | chance of top-1 0.06 %",
    ),
    *(row("knn/cls/concept@train", "unseen_style", at / 100, at) for at in (10, 20)),
    *(row("knn/pixels8/concept@train", "unseen_style", 0.41, at) for at in (10, 20)),
    row("fd_lite0", "unseen_style", 88.1),
    row("fd_lite0/floor", "unseen_style", 21.1),
]


def write_run(run: Path, name: str = "vtp-tiny", objective: str = "clip", quoted: str = "quoted") -> Path:
    run.mkdir(parents=True)
    metrics = [
        {
            "step": at,
            "loss": 9 / at,
            f"{objective}/term": 5 / at,
            f"weight/{objective}": 1.0,
            "lr/encoder": at * 1e-4,
        }
        | {"grad/encoder": 1.0 + at % 3, "time/step": 0.5, "time/data": 0.01, "images_per_second": 128.0}
        for at in range(1, 41)
    ]
    lines = {
        "metrics.jsonl": metrics,
        "probes.jsonl": [*READINGS, row(f"knn/{quoted}", quoted, 0.5, protocol=quoted)],
    }
    for file, rows in lines.items():
        (run / file).write_text("".join(json.dumps(entry) + "\n" for entry in rows))
    (run / "stack.yaml").write_text(f"modality: image\ndata: {quoted}\n")
    (run / "plan.txt").write_text(f"student  global  {quoted}\n")
    (run / "run.json").write_text(
        json.dumps({"name": name, "started": "2026-11-23T15:02:11+00:00", "status": "running"})
    )
    environment = {
        "platform": {"cpus": 2, "machine": "x86_64", "system": "Linux"},
        "packages": {"torch": quoted},
    }
    (run / "environment.json").write_text(json.dumps(environment))
    return run


@pytest.fixture
def opens(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``opens(bench)`` makes every run open as a blurring tokenizer over that bench."""

    def serve(bench: Any) -> None:
        module = ModuleType("vtp_core.evaluation")
        module.bench_of = lambda run, registry: (Blur(), bench)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "vtp_core.evaluation", module)

    return serve


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def report(run: Path) -> str:
    return Report(Spec()).vtp_finish(run, Registry()).read_text(encoding="utf-8")


def test_a_whole_run_fills_every_section(tmp_path: Path, opens: Any) -> None:
    opens(Colours())
    html = report(write_run(tmp_path / "run"))
    assert 'class="note"' not in html
    for section in SECTIONS:
        assert f'id="{section}"' in html
    text = " ".join(Page(html).text.split())
    for words in (
        "vtp-tiny",
        "2026-11-23 15:02",
        "20 s",
        "2 CPU cores",
        "40.00 dB",
        "18.50 dB on unseen_style",
    ):
        assert words in text
    for words in (
        "20.0 %",
        "below 8×8 pixels: 41.0 %",
        "chance 0.06 %",
        "floor 21.1",
        "a protocol",
        "colour 3",
    ):
        assert words in text


def test_the_page_stands_alone(tmp_path: Path, opens: Any) -> None:
    opens(Colours())
    html = report(write_run(tmp_path / "run"))
    page = Page(html)
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in html
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "form", "base"}
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name == "src":
            assert value.startswith("data:image/")
        if name in {"href", "xlink:href"}:
            assert value.startswith("#")
    assert not re.search(r"@import|url\((?!#)", html)
    assert len(html) < 4e6


def test_the_same_run_gives_the_same_page(tmp_path: Path, opens: Any) -> None:
    opens(Colours())
    run = write_run(tmp_path / "run")
    assert report(run) == report(run)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_whatever_is_quoted_is_text(tmp_path: Path, opens: Any, payload: str) -> None:
    opens(Colours([f"{payload} {i}" for i in range(COLOURS)]))
    html = report(
        write_run(tmp_path / "run", name=payload, objective=payload.replace("/", "|"), quoted=payload)
    )
    page = Page(html)
    assert not page.tags & {"script", "iframe"}
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert all(value.startswith("data:image/") for name, value in page.attributes if name == "src")
    assert page.text.count(payload) >= 20  # title, heading, chart, captions, table, plan, stack, environment
    assert any(payload in value for name, value in page.attributes if name == "alt")


def test_a_fault_costs_one_section_and_its_message_is_text(tmp_path: Path, opens: Any, caplog: Any) -> None:
    class Torn(Colours):
        def features(self, split: str) -> dict[str, Any]:
            raise RuntimeError(PAYLOADS[0])

    opens(Torn())
    html = report(write_run(tmp_path / "run"))
    assert Page(html).text.count(f"RuntimeError: {PAYLOADS[0]}") == 2  # neighbours and zero-shot
    assert "script" not in Page(html).tags
    assert 'alt="reconstruction of sample' in html
    assert "neighbours left out" in caplog.text


def test_an_empty_directory_gives_a_page_that_says_so(tmp_path: Path) -> None:
    text = Page(report(tmp_path)).text
    for words in (
        "metrics.jsonl is missing",
        "probes.jsonl is missing",
        "could not be opened",
        "plan.txt is missing",
    ):
        assert words in text


def test_without_a_tokenizer_the_curves_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("vtp_core.evaluation")

    def bench_of(run: Path, registry: Any) -> Any:
        raise LookupError(f"{run} has no valid checkpoint")

    module.bench_of = bench_of  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vtp_core.evaluation", module)
    html = report(write_run(tmp_path / "run"))
    assert html.count("has no valid checkpoint") == 4
    assert html.count("<svg") >= 6


def test_a_broken_file_is_named_and_a_torn_line_is_passed_over(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "lo')
    (run / "probes.jsonl").write_text("not a row\n")
    record = read(run, Registry())
    assert record.steps == 40
    assert len(record.faults) == 1
    assert "probes.jsonl, line 1" in Page(report(run)).text


def test_the_hook_is_one_that_pluggy_knows(tmp_path: Path, opens: Any) -> None:
    opens(Colours())
    manager = pluggy.PluginManager("vtp")
    manager.add_hookspecs(Hooks)
    manager.register(Report(Spec()), "report")
    manager.check_pending()
    run = write_run(tmp_path / "run")
    assert manager.hook.vtp_finish(run=run, registry=Registry()) == [run / "report.html"]


def test_secrets_of_the_environment_are_not_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "canary-0123456789")
    html = report(write_run(tmp_path / "run", quoted="canary-0123456789 s3://me:hunter2@host/x?sig=abcdef"))
    for part in ("stack.yaml", "plan.txt"):
        assert "canary" in (tmp_path / "run" / part).read_text()
    quoted = "".join(re.findall(r"<pre>.*?</pre>", html, flags=re.DOTALL))
    assert "***" in quoted
    assert not any(secret in quoted for secret in ("canary", "hunter2", "abcdef"))


# ---- pictures


def test_reconstructions_carry_the_psnr_of_what_is_shown() -> None:
    pairs = reconstructions(Blur(), Colours(), samples=3, seed=0)
    assert {split: len(rows) for split, rows in pairs.items()} == {"train": 3, "unseen_style": 3}
    image = next(Colours().images("train"))[:1]
    error = (image - Blur().decode(Blur().encode(image))).square().mean()
    found = {round(pair.psnr, 3) for pair in reconstructions(Blur(), Colours(), 6, 0)["train"]}
    assert round(float(-10 * error.log10()), 3) in found


def test_components_give_equal_places_equal_colours_and_no_sign_is_left_to_chance() -> None:
    x = torch.randn(4, 5, 3, 3, generator=torch.Generator().manual_seed(1))
    x[1] = x[0]
    colours, share = principal_colours(x)
    assert colours.shape == (4, 3, 3, 3)
    assert torch.equal(colours[0], colours[1])
    assert 0.6 < share <= 1
    turned, _ = principal_colours(x + 7)  # the mean is taken out
    assert torch.allclose(turned, colours, atol=1e-6)


def test_components_of_two_channels_have_no_blue() -> None:
    colours, share = principal_colours(torch.randn(2, 2, 4, 4))
    assert share == pytest.approx(1)
    assert not colours[:, 2].any()


def test_small_pictures_are_lossless_and_zoom_is_whole() -> None:
    import base64
    import io

    from PIL import Image

    x = torch.randint(0, 256, (3, 12, 20)).float() / 255
    shown = picture(x, "noise")
    decoded = Image.open(io.BytesIO(base64.b64decode(shown.uri.partition(",")[2])))
    assert decoded.getpixel((0, 0)) == tuple((x[:, 0, 0] * 255).round().int().tolist())
    assert (shown.large, shown.small) == (120, 60)
    assert picture(torch.rand(3, 512, 256), "large").width == 64


def test_neighbours_are_framed_by_what_they_share() -> None:
    found = neighbours(Colours(), samples=6, depth=3, seed=0)
    assert (found.query, found.base, found.across_styles) == ("unseen_style", "train", True)
    assert all(ranking.hits[0].match == "same" for ranking in found.rankings)
    assert {hit.match for ranking in found.rankings for hit in ranking.hits[1:]} == {"kin", "other"}


def test_in_a_single_split_a_sample_is_no_neighbour_of_itself() -> None:
    bench = Colours()
    bench.splits = ("train",)  # type: ignore[assignment]
    assert not [hit for r in neighbours(bench, 6, 1, 0).rankings for hit in r.hits if hit.match == "same"]


def test_relations_take_the_finest_field_there_is() -> None:
    assert Relation.of({"label": [1], "text": ["a"], "concept": [2]}) == Relation("concept", "label")
    assert Relation.of({"label": [1], "text": [None]}) == Relation("label", "")
    assert Relation.of({}).match({}, 0, {}, 0) == "other"


def test_zero_shot_ranks_both_ways_and_needs_captions() -> None:
    found = zero_shot(Blur(), Colours(), samples=2, depth=3, seed=0)
    assert (found.images, found.captions) == (6, 6)
    assert all(ranking.picture is None and len(ranking.hits) == 3 for ranking in found.to_images)
    for ranking in [*found.to_images, *found.to_captions]:
        cosines = [hit.cosine for hit in ranking.hits]
        assert cosines == sorted(cosines, reverse=True)

    class Silent(Colours):
        def features(self, split: str) -> dict[str, Any]:
            return {**super().features(split), "text": [None] * COLOURS}

    with pytest.raises(AbsentError, match="no captions"):
        zero_shot(Blur(), Silent(), samples=2, depth=3, seed=0)

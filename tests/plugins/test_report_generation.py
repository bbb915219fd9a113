"""The report's samples, strips and close-ups on toys: what is asked for, which noise, what stands between."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vtp_core.conditions import Conditions
from vtp_core.errors import StackFault
from vtp_core.generation import noise_of
from vtp_plugins.spec import Spec
from vtp_report import before, strips
from vtp_report.asked import asked
from vtp_report.draws import Draws, embedded
from vtp_report.generated import grid
from vtp_report.mixing import Between, between
from vtp_report.pictures import picture
from vtp_report.record import AbsentError, Record
from vtp_report.stage import Stage, stage_of

NAMES = ("cat", "dog", "emu", "fox")


class Zoo:
    """Images whose brightness is their label: 0 six times, 1 four times, 2 and 3 twice; some are broken."""

    fields = frozenset({"image", "label", "text"})
    labels = (0, 0, 1, 0, 2, 1, 0, 3, 1, 0, 2, 1, 0, 3)

    def __len__(self) -> int:
        return len(self.labels) + 2

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= len(self.labels):
            raise OSError("broken")
        label = self.labels[index]
        image = torch.full((3, 16, 16), 50 * label, dtype=torch.uint8)
        return {"image": image, "label": label, "text": f"a {NAMES[label]}"}


class Bench:
    splits = ("train", "unseen")
    device = torch.device("cpu")

    def dataset(self, split: str) -> Any:
        return Zoo()

    def images(self, split: str) -> Any:
        yield torch.stack([Zoo()[i]["image"].float() / 255 for i in range(4)])


class Toy:
    """A generator whose picture is its noise, made brighter by the label, twice as much where guided."""

    weak = None

    def __init__(self, kind: str = "label", scale: float = 1.0, sampler: str = "path") -> None:
        fields = {"label": "label", "embedding": "text"}
        self.spec: Any = Spec(
            size=(16, 16), patch=(8, 8), channels=3, classes=4, condition=kind, condition_width=2
        )
        self.names, self.condition = (NAMES if kind == "label" else ()), fields.get(kind)
        self.tokenizer: Any = SimpleNamespace(
            device=torch.device("cpu"), spec=self.spec,
            encode=lambda x: x, decode=lambda z: z * 0.5,
        )  # fmt: skip
        self.sampler = SimpleNamespace(kind=sampler)
        self.scale, self.evaluations, self.protocol = scale, 0, f"toy, scale {scale}"
        self.network = nn.Identity()
        self.conditions = Conditions(
            self.spec, self.condition, self.names, self.embed_text, torch.device("cpu")
        )
        self.label = self.conditions.label

    def embed_text(self, texts: Sequence[str]) -> Tensor:
        angles = torch.tensor([float(NAMES.index(text.split()[-1])) for text in texts]) * math.pi / 2
        return torch.stack([angles.cos(), angles.sin()], dim=1)

    def from_noise(self, noise: Tensor, condition: Any = None) -> Tensor:
        self.evaluations = 9
        light = 0.0 if condition is None else condition.float().view(len(noise), -1)[:, 0, None, None, None]
        return noise.repeat_interleave(8, 2).repeat_interleave(8, 3) + self.scale * light


def draws(kind: str = "label", wanted: Any = ("cat", "dog"), count: int = 3, guided: bool = True) -> Draws:
    plain = Toy(kind)
    return Draws(plain, Toy(kind, 2.0) if guided else None, asked(plain, Bench(), wanted), count, seed=5)


# ---- the stage


def test_a_stack_tells_what_its_page_shows() -> None:
    assert stage_of({}) == Stage()
    assert stage_of({"encoder": {"use": "vit"}}).retrained == ()
    gan = stage_of({"tokenizer": {"from": "runs/a", "frozen": ["encoder", "bottleneck"], "weights": "ema"}})
    assert (gan.source, gan.weights, gan.retrained, gan.generator) == ("runs/a", "ema", ("decoder",), False)
    frozen = {"from": "runs/a", "frozen": ["encoder", "bottleneck", "decoder"]}
    sampler = {"use": "euler", "guidance": {"scale": 2.0}}
    stage = stage_of({"tokenizer": frozen, "generator": {"use": "dit"}, "sampler": sampler})
    assert (stage.generator, stage.guided, stage.retrained) == (True, True, ())
    assert not stage_of({"sampler": {"use": "euler", "guidance": {"scale": 1.0}}}).guided
    assert not stage_of({"sampler": {"use": "euler"}}).guided


# ---- what is asked for


def test_the_most_frequent_labels_are_shown_in_their_order_with_an_image_each() -> None:
    found = asked(Toy(), Bench(), 2)
    assert [(one.name, one.value) for one in found] == [("cat", 0), ("dog", 1)]
    assert [round(float(one.real.mean()) * 255) for one in found if one.real is not None] == [0, 50]


def test_where_no_label_is_frequent_they_are_spread() -> None:
    assert [one.value for one in asked(Toy(), Bench(), 4)] == [0, 1, 2, 3]
    assert [one.value for one in asked(Toy(), Bench(), 9)] == [0, 1, 2, 3]
    assert [(one.value, one.real) for one in asked(Toy(), None, 2)] == [(0, None), (2, None)]


def test_labels_are_asked_for_by_name_or_number_and_a_wrong_one_is_told() -> None:
    assert [one.name for one in asked(Toy(), Bench(), ("emu", 3))] == ["emu", "fox"]
    with pytest.raises(StackFault, match="did you mean"):
        asked(Toy(), Bench(), ("catt",))


def test_captions_are_those_of_samples_each_once() -> None:
    found = asked(Toy("embedding"), Bench(), 3)
    assert len({one.value for one in found}) == 3
    assert all(one.real is not None and one.name == one.value for one in found)
    assert [one.value for one in asked(Toy("embedding"), None, ("a cat",))] == ["a cat"]
    with pytest.raises(AbsentError, match="no text"):
        asked(Toy("embedding"), None, 3)


def test_without_a_condition_rows_have_images_and_no_name() -> None:
    found = asked(Toy(""), Bench(), 3)
    assert [(one.name, one.value, one.real is None) for one in found] == [("", None, False)] * 3
    assert [one.real for one in asked(Toy(""), None, 2)] == [None, None]


# ---- samples


def test_every_row_and_both_ways_of_sampling_begin_at_the_same_noise() -> None:
    toys = draws()
    noise = noise_of(toys.plain, 3, seed=5).repeat_interleave(8, 2).repeat_interleave(8, 3)
    plain, guided = toys.samples(False), toys.samples(True)
    assert plain.shape == (2, 3, 3, 16, 16)
    assert torch.equal(plain, torch.stack([noise, noise + 1]))
    assert torch.equal(guided, torch.stack([noise, noise + 2]))


def test_noise_depends_on_the_seed_and_its_number_alone() -> None:
    few, many = draws(count=2), draws(count=7, wanted=("cat", "dog", "emu"))
    assert torch.equal(few.samples(False)[0], many.samples(False)[0, :2])
    assert not torch.equal(few.noise(1), Draws(few.plain, None, few.conditions, 2, seed=6).noise(1))


def test_without_a_condition_every_sample_has_its_own_noise() -> None:
    toys = draws("", 2)
    assert torch.equal(toys.noise(2), noise_of(toys.plain, 6, seed=5))
    assert toys.samples(False).shape[:2] == (2, 3)
    assert embedded(toys.plain, [None]) is None


def test_the_grid_has_a_real_image_its_reconstruction_and_protocols() -> None:
    found = grid(draws())
    assert [(row.name, len(row.plain), len(row.guided)) for row in found.rows] == [
        ("cat", 3, 3),
        ("dog", 3, 3),
    ]
    dog = Zoo()[2]["image"].float() / 255
    assert found.rows[1].real == picture(dog, "real, dog")
    assert found.rows[1].reconstruction == picture(dog / 2, "reconstruction, dog")
    assert found.protocols == [("without guidance", "toy, scale 1.0", 9), ("guided", "toy, scale 2.0", 9)]
    alone = grid(draws(guided=False))
    assert (alone.guided, [row.guided for row in alone.rows]) == (False, [[], []])


# ---- strips


def test_spherical_interpolation_keeps_the_norm_and_meets_its_ends() -> None:
    a, b = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])
    found = strips.slerp(a, b, torch.tensor([0.0, 1 / 3, 0.5, 1.0]))
    turned = [[2.0, 0.0], [math.sqrt(3), 1.0], [math.sqrt(2), math.sqrt(2)], [0.0, 2.0]]
    torch.testing.assert_close(found, torch.tensor(turned))
    torch.testing.assert_close(strips.slerp(a, 3 * a, torch.tensor([0.5]))[0], 2 * a)  # one direction
    assert torch.isfinite(strips.slerp(a, -a, torch.tensor([0.5]))).all()


def test_the_strip_of_noise_ends_at_two_samples_of_the_grid() -> None:
    toys = draws()
    strip = strips.noises(toys, 5)
    assert [frame.share for frame in strip.frames] == [0, 25, 50, 75, 100]
    shown = [frame.picture.uri for frame in strip.frames]
    made = grid(toys).rows[0].guided
    assert (shown[0], shown[-1]) == (made[0].uri, made[1].uri)
    first, second = noise_of(toys.plain, 2, 5)
    middle = toys.best.from_noise(
        strips.slerp(first, second, torch.tensor([0.5])), torch.zeros(1, dtype=torch.int64)
    )
    assert shown[2] == picture(middle[0], "").uri


def test_captions_are_gone_between_along_the_sphere() -> None:
    toys = draws("embedding", ("a cat", "a dog"), guided=False)
    strip = strips.conditions(toys, 3)
    assert (strip.first, strip.second, strip.labels) == ("a cat", "a dog", False)
    middle = toys.plain.from_noise(noise_of(toys.plain, 1, 5), torch.full((1, 2), math.sqrt(0.5)))
    assert strip.frames[1].picture.uri == picture(middle[0], "").uri


def test_one_label_and_generators_without_noise_have_no_strip() -> None:
    with pytest.raises(AbsentError, match="two labels"):
        strips.conditions(draws(wanted=("cat",)), 3)
    with pytest.raises(AbsentError, match="two labels"):
        strips.conditions(draws("", 3), 3)
    toys = draws()
    toys.plain.sampler.kind = "autoregressive"
    for strip in (strips.noises, strips.conditions):
        with pytest.raises(AbsentError, match="does not begin at a noise"):
            strip(toys, 3)


class Table(nn.Module):
    """A network that predicts x plus its label; its state is the labels it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.states: list[Any] = []

    def forward(self, x: Tensor, u: Any, condition: Tensor, want: Any, state: Any = None) -> dict[str, Any]:
        assert len(u) in (1, len(x))
        self.states.append(state)
        return {"prediction": x + condition.view(-1, 1, 1, 1), "state": condition}


@pytest.mark.parametrize("levels", [1, 5])
def test_between_two_labels_predictions_are_averaged_and_nulls_are_left_alone(levels: int) -> None:
    network = Between(Table(), 10, 20, torch.tensor([0.25, 0.5, 1.0]))
    condition = torch.tensor([-1, -2, -3, 4, 4])  # three frames, then nulls
    x = torch.zeros(5, 2, 3, 3)
    found = network(x, torch.ones(levels), condition, frozenset({"prediction", "state"}))
    torch.testing.assert_close(found["prediction"][:, 0, 0, 0], torch.tensor([12.5, 15.0, 20.0, 4.0, 4.0]))
    assert {name: value.tolist() for name, value in found["state"].items()} == {
        "first": [10, 10, 10, 4, 4],
        "second": [20, 20, 20],
    }
    network(x, torch.ones(1), condition, frozenset({"prediction"}), found["state"])
    assert network.network.states[-2:] == [found["state"]["first"], found["state"]["second"]]
    plain = network(x, torch.ones(1), torch.arange(5), frozenset({"prediction"}))
    assert plain["prediction"][:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]


def test_the_generator_itself_keeps_its_network() -> None:
    toy = Toy()
    network = toy.network
    other, condition = between(toy, 0, 1, torch.tensor([0.5]))
    assert condition.tolist() == [-1]
    assert toy.network is network
    assert other.network.network is network


# ---- before and after


def test_a_crop_shows_the_place_with_most_detail() -> None:
    x = torch.zeros(3, 16, 24)
    x[:, 9:15:2, 13:22:2] = 1
    top, left, high, wide = before.detailed(x)
    assert (high, wide) == (8, 12)
    assert top <= 9
    assert top + high >= 14
    assert left <= 13
    assert left + wide >= 22


def test_a_run_that_is_gone_has_no_before() -> None:
    stage = Stage(source="/nowhere/run", retrained=("decoder",))
    record = Record(Path("run"), [], [], "", "", {}, {}, stage=stage)
    with pytest.raises(AbsentError, match="no longer at /nowhere/run"):
        before.before(record, None, Bench(), 2, 0)

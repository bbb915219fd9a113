"""The field: branches in one forward, intervals and channels of guidance, a weak generator, counts."""

from __future__ import annotations

import pytest
import torch
from closed_form import Normal, Split, Straight, null
from pydantic import ValidationError
from torch import Tensor, nn

from vtp_core.samplers.field import Field
from vtp_core.samplers.guidance import Guidance
from vtp_core.samplers.reuse import Reuse

LABELS = torch.tensor([0, 2])


def level(u: float) -> Tensor:
    return torch.tensor([u])


def alone(x: Tensor, u: float, labels: Tensor) -> Tensor:
    return Normal()(x, level(u), labels)["prediction"]


def test_without_guidance_the_generator_is_asked_once_for_its_own_rows() -> None:
    network = Normal()
    field = Field(network, Straight())
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(field.velocity(x, level(0.5), LABELS), alone(x, 0.5, LABELS))
    assert network.rows == [2] and field.evaluations == 1
    assert network.calls[0]["want"] == {"prediction"}


def test_both_branches_are_one_forward_with_one_level_conditioned_rows_first() -> None:
    network = Normal()
    field = Field(network, Straight(), guidance=Guidance(scale=3.0), null=null)
    x = torch.randn(2, 4, 3, 3)
    guided = field.predict(x, level(0.5), LABELS)["prediction"]
    assert network.rows == [4] and field.evaluations == 1
    assert network.calls[0]["condition"].tolist() == [0, 2, 3, 3]
    strong, weak = alone(x, 0.5, LABELS), alone(x, 0.5, null(LABELS))
    torch.testing.assert_close(guided, weak + 3 * (strong - weak))


def test_velocity_and_score_are_guided() -> None:
    field = Field(Normal(), Straight(), guidance=Guidance(scale=2.0), null=null)
    x, u = torch.randn(2, 4, 3, 3), level(0.4)
    v = field.velocity(x, u, LABELS)
    torch.testing.assert_close(field.score(x, u, LABELS), -(x + 0.6 * v) / 0.4)
    strong, weak = (Straight().convert(alone(x, 0.4, c), x, u, "score") for c in (LABELS, null(LABELS)))
    torch.testing.assert_close(field.score(x, u, LABELS), weak + 2 * (strong - weak))


@pytest.mark.parametrize("channels", [3, "first_3"])
def test_the_other_channels_stay_conditioned(channels: int | str) -> None:
    x, u = torch.randn(2, 5, 3, 3), level(0.5)
    first = Field(Normal(), Straight(), guidance=Guidance(scale=4.0, channels=channels), null=null)
    every = Field(Normal(), Straight(), guidance=Guidance(scale=4.0), null=null)
    some, all_ = (field.velocity(x, u, LABELS) for field in (first, every))
    assert torch.equal(some[:, :3], all_[:, :3])
    assert torch.equal(some[:, 3:], alone(x, 0.5, LABELS)[:, 3:])
    assert not torch.allclose(all_[:, 3:], some[:, 3:])


@pytest.mark.parametrize(
    ("edges", "guided"),
    [("closed", [0.2, 0.5, 0.7]), ("open", [0.5])],
)
def test_outside_the_interval_only_the_conditioned_branch_runs(edges: str, guided: list[float]) -> None:
    network = Normal()
    field = Field(
        network, Straight(), guidance=Guidance(scale=2.0, interval=(0.2, 0.7), edges=edges), null=null
    )
    x = torch.randn(2, 4, 3, 3)
    for u in (1.0, 0.701, 0.7, 0.5, 0.2, 0.199, 0.0):
        v = field.velocity(x, level(u), LABELS)
        assert torch.equal(v, alone(x, u, LABELS)) == (u not in guided)
    assert [call["u"] for call in network.calls if len(call["x"]) == 4] == pytest.approx(guided[::-1])


def test_the_interval_says_the_native_forms() -> None:
    """LightningDiT: t >= 0.125 of data time; REPA: 0 <= u <= 0.7; DDT: 0.3 < t < 1 of data time."""
    points = torch.linspace(0, 1, 81)
    lightning, repa = Guidance(scale=2, interval=(0, 0.875)), Guidance(scale=2, interval=(0, 0.7))
    ddt = Guidance(scale=2, interval=(0, 0.7), edges="open")
    for t in points.tolist():
        u = float(1 - torch.tensor(t))
        assert lightning.applies(u) == (t >= 0.125)
        assert repa.applies(t) == (t <= 0.7 + 1e-6)
        assert ddt.applies(u) == (0.3 + 1e-6 < t < 1)


def test_a_scale_of_one_runs_one_branch_and_needs_no_null() -> None:
    network = Normal()
    Field(network, Straight(), guidance=Guidance(scale=1.0)).velocity(
        torch.randn(2, 4, 3, 3), level(0.5), LABELS
    )
    assert network.rows == [2]


def test_a_weak_generator_guides_under_the_same_condition() -> None:
    strong, weak = Normal(), Normal(spread=0.9)
    guidance = Guidance(scale=1.42, use="auto", interval=(0.0, 0.6))
    field = Field(strong, Straight(), guidance=guidance, weak=weak)
    x, u = torch.randn(2, 4, 3, 3), level(0.5)
    v = field.velocity(x, u, LABELS)
    v_s, v_w = alone(x, 0.5, LABELS), Normal(spread=0.9)(x, u, LABELS)["prediction"]
    torch.testing.assert_close(v, v_w + 1.42 * (v_s - v_w))
    assert torch.equal(field.velocity(x, level(0.7), LABELS), alone(x, 0.7, LABELS))
    assert (strong.rows, weak.rows, field.evaluations) == ([2, 2], [2], 2)


def test_guidance_without_what_it_needs_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match="cfg needs a null condition"):
        Field(Normal(), Straight(), guidance=Guidance(scale=2))
    with pytest.raises(ValueError, match="auto needs a second, weaker generator"):
        Field(Normal(), Straight(), guidance=Guidance(scale=2, use="auto"))


@pytest.mark.parametrize(
    "wrong",
    [{"interval": (0.7, 0.2)}, {"channels": 0}, {"channels": "last"}, {"scale": -1}, {"scales": 2}],
)
def test_wrong_guidance_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Guidance.model_validate(wrong)


class Learned(nn.Module):
    """Learns a variance too."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(
        self, x: Tensor, u: Tensor, condition: Tensor, want: frozenset[str], state: None = None
    ) -> dict[str, Tensor]:
        assert x.dtype == u.dtype == torch.float32
        by_class = condition.view(-1, 1, 1, 1) * self.scale
        found = {"prediction": x * by_class, "variance": x + by_class}
        return {name: found[name] for name in want}


class Discrete(Straight):
    """A path whose variances may be learned."""

    def respaced(self, steps: int, spacing: str) -> None: ...


def test_variance_is_the_conditioned_branch_s_and_the_generator_keeps_its_precision() -> None:
    guidance = Guidance(scale=2.0, channels=1)
    assert set(Field(Learned(), Straight()).predict(torch.ones(2, 4, 3, 3), level(0.5), LABELS)) == {
        "prediction"
    }
    field = Field(Learned(), Discrete(), guidance=guidance, null=null)
    x = torch.randn(2, 4, 3, 3).double()
    with torch.no_grad():
        found = field.predict(x, level(0.5).double(), LABELS)
    assert found["prediction"].dtype == found["variance"].dtype == torch.float64
    label = LABELS.view(-1, 1, 1, 1)
    torch.testing.assert_close(found["variance"], (x.float() + label).double())
    torch.testing.assert_close(found["prediction"][:, :1], (2 * label - 3) * x[:, :1].float().double())
    torch.testing.assert_close(found["prediction"][:, 1:], label * x[:, 1:].float().double())


def test_a_state_serves_until_the_next_refreshed_step_in_both_branches() -> None:
    network = Split()
    guidance = Guidance(scale=2.0, interval=(0.0, 0.6))
    field = Field(network, Straight(), guidance=guidance, null=null, reuse=Reuse(use="listed", at=(0, 3)))
    x = torch.randn(2, 4, 3, 3)
    levels = [1.0, 0.8, 0.5, 0.3, 0.1]
    field.start(5)
    with torch.no_grad():
        found = [field.velocity(x, level(u), LABELS) for u in levels]
        states = {
            u: [network(x, level(u), c, frozenset({"state"}))["state"] for c in (LABELS, null(LABELS))]
            for u in (1.0, 0.3)
        }
        for u, of, v in zip(levels, [1.0, 1.0, 1.0, 0.3, 0.3], found, strict=True):
            strong, weak = (
                network(x, level(u), c, frozenset({"prediction"}), state)["prediction"]
                for c, state in zip((LABELS, null(LABELS)), states[of], strict=True)
            )
            torch.testing.assert_close(v, weak + 2 * (strong - weak) if u <= 0.6 else strong)
    assert (field.evaluations, field.refreshes) == (5, 2)


def test_evaluations_of_one_step_share_its_refresh_and_its_guidance() -> None:
    network = Split()
    guidance = Guidance(scale=2.0, interval=(0.0, 0.6))
    field = Field(network, Straight(), guidance=guidance, null=null, reuse=Reuse(use="listed", at=(0,)))
    x = torch.randn(2, 4, 3, 3)
    field.start(2)
    with torch.no_grad():
        field.velocity(x, level(0.9), LABELS)
        later = field.velocity(x, level(0.5), LABELS, at=level(0.9))
        assert field.refreshes == 2
        torch.testing.assert_close(later, network(x, level(0.5), LABELS)["prediction"])
        field.velocity(x, level(0.5), LABELS)
    assert (field.evaluations, field.refreshes, network.encoded) == (3, 2, 3)


def test_a_new_integration_forgets_states() -> None:
    network = Split()
    field = Field(network, Straight(), reuse=Reuse(keep=1))
    for rows in (2, 1, 3):
        field.start(2)
        with torch.no_grad():
            for u in (1.0, 0.5):
                field.velocity(torch.randn(rows, 4, 3, 3), level(u), torch.zeros(rows, dtype=torch.int64))
    assert (field.evaluations, field.refreshes, network.encoded) == (6, 3, 3)


def test_a_generator_that_learns_no_variance_is_asked_for_one_once() -> None:
    network, x = Split(), torch.randn(2, 4, 3, 3)
    field = Field(network, Discrete())
    for _ in range(2):
        assert set(field.predict(x, level(0.5), LABELS)) == {"prediction"}
    assert field.evaluations == 2 and network.encoded == 3

"""Diffusion transformers: shapes, early exits, reuse, gradients and switches; parity is in test_dit_golden."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vtp_core.components import resolve
from vtp_core.errors import StackFault
from vtp_core.recomputing import recompute
from vtp_dit import DDT, DiT, DiTDH, LightningDiT, NarrowWarning, SiT
from vtp_dit.positions import angles, sincos
from vtp_flow import Linear
from vtp_plugins.registry import Registry
from vtp_plugins.spec import Spec

SPEC = Spec(size=(16, 16), patch=(4, 4), channels=4, classes=3, condition="label")
PLAIN: dict[str, Any] = {"width": 24, "depth": 3, "heads": 2, "patch": 2}
SPLIT: dict[str, Any] = {
    "width": 24, "heads": 2, "encoder_blocks": 2, "head_blocks": 1, "head_width": 32, "head_heads": 2, "patch": 2,
}  # fmt: skip
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "dit": (DiT, PLAIN), "sit": (SiT, PLAIN), "lightningdit": (LightningDiT, PLAIN),
    "ddt": (DDT, SPLIT), "dit_dh": (DiTDH, SPLIT),
}  # fmt: skip
PREDICTION = frozenset({"prediction"})


def made(name: str, spec: Spec = SPEC, **options: Any) -> Any:
    """A generator none of whose parameters is zero."""
    cls, own = FAMILIES[name]
    network = cls(spec, **{**own, **options})
    with torch.no_grad():
        for key, parameter in network.named_parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter) + float("norm" in key and "weight" in key))
    return network


def inputs(rows: int = 3, cells: tuple[int, ...] = (4, 4)) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(rows, 4, *cells), torch.rand(rows), torch.arange(rows) % 4


@pytest.fixture(params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# ----------------------------------------------------------------------------------------------- sizes

PUBLISHED = [  # millions, as the references count: with the fixed position table of their 256 or 1024 tokens
    (DiT, "S", 4, 32.96), (DiT, "B", 4, 130.5), (DiT, "L", 4, 458.1), (DiT, "XL", 4, 675.1),
    (SiT, "S", 4, 32.96), (SiT, "B", 4, 130.5), (SiT, "L", 4, 458.1), (SiT, "XL", 4, 675.1),
    (LightningDiT, "B", 32, 130.6), (LightningDiT, "L", 32, 458.2), (LightningDiT, "XL", 32, 675.3),
    (LightningDiT, "1p0B", 32, 1029.0), (LightningDiT, "1p6B", 32, 1632.0),
    (DDT, "B", 4, 130.3), (DDT, "L", 4, 457.7), (DDT, "XL", 4, 674.7),
    (DiTDH, "S", 768, 196.5), (DiTDH, "B", 768, 294.3), (DiTDH, "L", 768, 621.7), (DiTDH, "XL", 768, 838.7),
]  # fmt: skip


@pytest.mark.parametrize(("cls", "size", "channels", "millions"), PUBLISHED)
def test_published_sizes_have_their_published_parameters(
    cls: Any, size: str, channels: int, millions: float
) -> None:
    spec = Spec(size=(256, 256), patch=(16, 16), channels=channels, classes=1000, condition="label")
    with torch.device("meta"):
        network = cls(spec, size=size)
    table = 0 if cls is DDT else 256 * network.width
    count = sum(parameter.numel() for parameter in network.parameters()) + table
    assert abs(count / 1e6 - millions) < (0.5 if millions > 1000 else 0.06)


def test_the_largest_run_on_the_meta_device() -> None:
    spec = Spec(size=(256, 256), patch=(16, 16), channels=32, classes=1000, condition="label")
    want = frozenset({"prediction", "hidden:8"})
    with torch.device("meta"):
        found = LightningDiT(spec, size="xl")(
            torch.empty(2, 32, 16, 16), torch.empty(1), torch.zeros(2).long(), want
        )
        spec = replace(spec, channels=768)
        both = DiTDH(spec, size="xl")(
            torch.empty(2, 768, 16, 16),
            torch.empty(2),
            torch.zeros(2).long(),
            frozenset({"prediction", "state"}),
        )
    assert found["prediction"].shape == (2, 32, 16, 16) and found["hidden:8"].shape == (2, 256, 1152)
    assert both["prediction"].shape == (2, 768, 16, 16) and both["state"].shape == (2, 256, 1152)


def test_the_stacks_dial_and_names_in_capitals_choose_a_size() -> None:
    registry = Registry()
    for cls in (DiT, DDT):
        name = cls.__name__.lower()
        found = resolve(registry, "generators", "generator", {"use": name}, "s")
        with torch.device("meta"):
            assert found.build(SPEC).width == 384
            found = resolve(
                registry, "generators", "generator", {"use": name, "size": "XL", "width": 64, "heads": 4}, "s"
            )
            network = found.build(SPEC)
        assert (network.width, network.depth) == (64, 28)
    with pytest.raises(StackFault, match="did you mean 'qk_norm'"):
        resolve(registry, "generators", "generator", {"use": "sit", "qknorm": "rms"}, "tiny")
    with pytest.raises(StackFault, match=r"generator\.size"):
        resolve(registry, "generators", "generator", {"use": "sit", "size": "huge"}, "tiny")
    with pytest.raises(ValueError, match="size: no 'huge'"):
        SiT(SPEC, size="huge")  # type: ignore[arg-type]


def test_a_generator_narrower_than_a_latent_token_warns() -> None:
    with pytest.warns(NarrowWarning, match="24 is less than the 64 values"):
        SiT(replace(SPEC, channels=16), **PLAIN)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DiTDH(replace(SPEC, channels=8), **SPLIT)  # the encoder is narrower, the head is not


# -------------------------------------------------------------------------------------------- outputs


def test_a_fresh_generator_predicts_zero(name: str) -> None:
    cls, options = FAMILIES[name]
    x, u, labels = inputs()
    assert not cls(SPEC, **options)(x, u, labels)["prediction"].any()


def test_blocks_start_as_the_identity_unless_told_otherwise() -> None:
    x, u, labels = inputs()
    want = frozenset({"hidden:1", "hidden:3"})
    found = SiT(SPEC, **PLAIN)(x, u, labels, want)
    assert torch.equal(found["hidden:1"], found["hidden:3"])
    found = SiT(SPEC, **PLAIN, zero=False)(x, u, labels, want)
    assert not torch.allclose(found["hidden:1"], found["hidden:3"])


def test_gated_feed_forwards_are_drawn_as_one_layer() -> None:
    block: Any = LightningDiT(SPEC, width=96, depth=1, heads=2).body.blocks[0]
    bound = (6 / (96 + 2 * 256)) ** 0.5
    for weight in (block.mlp.w1.weight.detach(), block.mlp.w2.weight.detach()):
        assert weight.abs().max() <= bound and weight.std() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_every_grid_is_taken_as_it_comes(name: str) -> None:
    network = made(name)
    for cells in ((4, 4), (2, 6), (8, 4)):
        x, u, labels = inputs(cells=cells)
        found = network(x, u, labels, frozenset({"prediction", "hidden:1"}))
        assert found["prediction"].shape == x.shape
        assert found["hidden:1"].shape == (3, cells[0] * cells[1] // 4, 24)


def test_one_axis_is_enough(name: str) -> None:
    spec = replace(SPEC, size=(64,), patch=(4,))
    x, u, labels = inputs(cells=(10,))
    assert made(name, spec)(x, u, labels)["prediction"].shape == x.shape


@pytest.mark.parametrize("rope", ["none", "grid", "span"])
def test_a_token_knows_its_place(rope: Any) -> None:
    """With positions, moving the input moves more than the output; without any, the output moves with it."""
    network = made("sit", positions="none", rope=rope)
    x, u, labels = inputs(cells=(4, 8))
    moved = x.roll(2, dims=3)
    same = torch.allclose(
        network(moved, u, labels)["prediction"],
        network(x, u, labels)["prediction"].roll(2, dims=3),
        atol=1e-5,
    )
    assert same == (rope == "none")


def test_hidden_outputs_alone_stop_early_with_the_same_values(name: str) -> None:
    network = made(name)
    x, u, labels = inputs()
    everything = frozenset({"prediction", "hidden:1", "hidden:2", "hidden:3"})
    whole = network(x, u, labels, everything)
    for last in (1, 2, 3):
        ran: list[str] = []
        with Watched(network, ran):
            found = network(x, u, labels, frozenset({"hidden:1", f"hidden:{last}"}))
        assert found.keys() == {"hidden:1", f"hidden:{last}"}
        assert all(torch.equal(value, whole[key]) for key, value in found.items())
        assert len([part for part in ran if part == "Block"]) == last
        assert "Final" not in ran


class Watched:
    """Names the classes of the modules that run."""

    def __init__(self, network: nn.Module, ran: list[str]) -> None:
        self.network, self.ran = network, ran

    def __enter__(self) -> None:
        self.handles = [
            part.register_forward_hook(lambda module, *_: self.ran.append(type(module).__name__))
            for part in self.network.modules()
        ]

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def test_outputs_that_do_not_exist_are_named(name: str) -> None:
    network = made(name)
    x, u, labels = inputs()
    for output in ("hidden:4", "hidden:0", "hidden:x", "predictoin"):
        with pytest.raises(LookupError, match=f"no output {output!r}"):
            network(x, u, labels, frozenset({output}))
    if name not in {"dit", "sit"}:
        with pytest.raises(LookupError, match="no output 'variance'"):
            network(x, u, labels, frozenset({"variance"}))


def test_a_learned_variance_is_the_last_layers_second_half() -> None:
    network = made("dit")
    x, u, labels = inputs()
    both = network(x, u, labels, frozenset({"prediction", "variance"}))
    assert both["variance"].shape == x.shape
    torch.testing.assert_close(network(x, u, labels)["prediction"], both["prediction"])
    loss = network(x, u, labels)["prediction"].square().mean()
    grad = torch.autograd.grad(loss, network.final.proj.weight)[0]
    assert grad[:16].all() and not grad[16:].any()


# --------------------------------------------------------------------------------------- conditioning


@pytest.mark.parametrize("condition", ["label", "embedding", ""])
def test_one_level_for_all_rows_is_embedded_once(name: str, condition: str) -> None:
    network = made(name, replace(SPEC, condition=condition, condition_width=5)).double()
    x, labels = torch.randn(3, 4, 4, 4).double(), torch.tensor([0, 3, 1])
    given = {"label": labels, "embedding": torch.randn(3, 5).double(), "": None}[condition]
    shapes: dict[nn.Module, Any] = {}
    for part in (network.time, network.body.blocks[0].modulation):
        part.register_forward_hook(lambda module, args, _: shapes.__setitem__(module, args[0].shape))
    want = frozenset({"prediction", "hidden:1"})
    once = network(x, torch.tensor([0.3]).double(), given, want)
    assert shapes[network.time] == (1,)
    assert shapes[network.body.blocks[0].modulation] == ((1 if given is None else 3), 1, 24)
    thrice = network(x, torch.full((3,), 0.3).double(), given, want)
    for key in want:
        torch.testing.assert_close(once[key], thrice[key])


def test_rows_differ_by_label_and_the_null_class_comes_last(name: str) -> None:
    network = made(name)
    x = torch.randn(1, 4, 4, 4).expand(4, -1, -1, -1)
    rows = network(x, torch.tensor([0.5]), torch.arange(4))["prediction"]
    assert all(not torch.allclose(a, b) for a, b in itertools.combinations(rows, 2))
    with pytest.raises(IndexError):
        network(x, torch.tensor([0.5]), torch.arange(1, 5))


def test_the_null_embedding_is_the_zero_vector() -> None:
    network = made("lightningdit", replace(SPEC, condition="embedding", condition_width=5))
    x, u, _ = inputs()
    seen: list[Tensor] = []
    network.condition.register_forward_hook(lambda module, args, out: seen.append(out))
    network(x, u, torch.zeros(3, 5))
    assert torch.equal(seen[0], network.condition.proj.bias.expand(3, -1))


def test_flipped_weights_are_fed_the_other_time_and_a_velocity_is_negated(name: str) -> None:
    network = made(name, timesteps=0)
    x, u, labels = inputs()
    plain = network(x, 1 - u, labels)["prediction"]
    network.flip = True
    torch.testing.assert_close(network(x, u, labels)["prediction"], -plain)


def velocity_in_their_time(given: str, value: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """dx/dt = data - noise of x = t data + (1 - t) noise, from what a network with that time predicts."""
    if given == "velocity":
        return value
    if given == "data":
        return value - (x - t * value) / (1 - t)
    noise = -(1 - t) * value if given == "score" else value  # the score of N(t data, (1 - t)^2) at x
    return (x - (1 - t) * noise) / t - noise


@pytest.mark.parametrize("predicts", ["velocity", "noise", "data", "score"])
def test_flipped_weights_move_a_latent_as_they_do_in_their_own_time(predicts: Any) -> None:
    path = Linear(SPEC, predicts=predicts)
    network = made("sit", replace(SPEC, path=path), flip=True)
    x, u, labels = inputs()
    ours = path.convert(network(x, u, labels)["prediction"], x, u, "velocity")
    network.flip = False
    raw = network(x, 1 - u, labels)["prediction"]
    theirs = velocity_in_their_time(predicts, raw, x, (1 - u).view(-1, 1, 1, 1))
    torch.testing.assert_close(ours, -theirs, rtol=1e-4, atol=1e-4)  # u = 1 - t


def test_what_has_no_known_sign_is_not_flipped() -> None:
    class Odd:
        predicts = "curvature"

    with pytest.raises(ValueError, match="flip: the path predicts 'curvature'"):
        SiT(replace(SPEC, path=Odd()), **PLAIN, flip=True)
    SiT(replace(SPEC, path=Odd()), **PLAIN)


def test_discrete_levels_are_the_very_timesteps() -> None:
    network = DiT(SPEC, **PLAIN)
    steps = torch.arange(1000)
    assert torch.equal(network.times((steps + 1) / 1000), steps.float())
    assert torch.equal(network.times((steps.double() + 1) / 1000), steps.double())
    torch.testing.assert_close(network.times(torch.tensor([0.0275])), torch.tensor([26.5]))
    assert network.times(torch.tensor([0.5], dtype=torch.bfloat16)).dtype == torch.float32


def test_faults_name_the_key_and_the_remedy() -> None:
    x, u, labels = inputs()
    network = made("lightningdit")

    def refused(match: str, *args: Any, **keys: Any) -> None:
        with pytest.raises(ValueError, match=match):
            network(*args, **keys)

    refused("generator.path", x, None, labels)
    refused(r"u: \(3,\) or \(1,\)", x, u[:2], labels)
    refused("give the null class", x, u, None)
    refused("labels .* are wanted", x, u, torch.randn(3))
    refused(r"reads \(R, 4, \*grid\)", x[:, :2], u, labels)
    refused(r"generator.patch: 2 does not divide", torch.randn(3, 4, 5, 4), u, labels)
    refused("state: this generator has none", x, u, labels, state=x)
    network = made("lightningdit", replace(SPEC, condition=""))
    refused("built without one", x, u, labels)
    network = made("lightningdit", replace(SPEC, condition="embedding", condition_width=5))
    refused(r"embeddings \(R, 5\) are wanted", x, u, labels)

    def unbuilt(match: str, spec: Spec = SPEC, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            SiT(spec, **{**PLAIN, **options})

    unbuilt("heads: 5 does not divide", heads=5)
    unbuilt("heads: 6 channels per head", heads=4, rope="grid")
    unbuilt("width: 26; positions", width=26, heads=1)
    unbuilt("flip: a process of timesteps", flip=True, timesteps=10)
    unbuilt("channels are unknown", replace(SPEC, channels=0))
    unbuilt("'label' needs a dataset with labels", replace(SPEC, classes=0))
    unbuilt("width of the conditioning embedding", replace(SPEC, condition="embedding"))
    unbuilt("neither 'label' nor", replace(SPEC, condition="smell"))


def test_a_learned_table_is_for_one_grid() -> None:
    network = made("sit", positions="learned")
    assert network.body.places.table.shape == (4, 24)
    x, u, labels = inputs(cells=(4, 6))
    with pytest.raises(ValueError, match="positions: learned for"):
        network(x, u, labels)
    assert made("sit", positions="learned", grid=(4, 6))(x, u, labels)["prediction"].shape == x.shape


# ---------------------------------------------------------------------------------------------- state


@pytest.mark.parametrize("name", ["ddt", "dit_dh"])
def test_a_given_state_replaces_the_encoder(name: str) -> None:
    network = made(name)
    x, u, labels = inputs()
    whole = network(x, u, labels, frozenset({"prediction", "state", "hidden:3"}))
    ran: list[str] = []
    with Watched(network, ran):
        alone = network(x, u, labels, frozenset({"state"}))
    assert ran.count("Block") == 2 and "Final" not in ran
    assert torch.equal(alone["state"], whole["state"])
    del ran[:]
    with Watched(network, ran):
        again = network(x, None, None, frozenset({"prediction", "state", "hidden:3"}), whole["state"])
    assert ran.count("Block") == 1 and not {"TimeEmbedding", "Labels"} & set(ran)
    assert again.keys() == whole.keys() and all(torch.equal(again[key], whole[key]) for key in whole)
    other = network(0.5 * x, None, None, PREDICTION, whole["state"])["prediction"]
    assert not torch.allclose(other, whole["prediction"])
    with pytest.raises(LookupError, match="hidden:2: of the encoder"):
        network(x, u, labels, frozenset({"hidden:2"}), whole["state"])


def test_equal_widths_need_no_projection() -> None:
    assert DiTDH(SPEC, **{**SPLIT, "head_width": 24}).widen is None
    assert DDT(SPEC, width=48, heads=2).head.blocks[0].attn.heads == 2
    assert DDT(SPEC, size="tiny").depth == 6


# ------------------------------------------------------------------------------------------ gradients


def owners(network: nn.Module) -> set[str]:
    """Parameters that have a gradient; none of them may be all zero."""
    found = {key: p.grad for key, p in network.named_parameters() if p.grad is not None}
    assert all(grad.any() for grad in found.values())
    return set(found)


def test_gradient_reaches_every_parameter_and_the_latent(name: str) -> None:
    network = made(name)
    x, u, labels = inputs()
    x.requires_grad_()
    output = "variance" if network.switches.variance else "prediction"
    network(x, u, labels, frozenset({output}))[output].square().sum().backward()
    assert owners(network) == set(dict(network.named_parameters()))
    assert x.grad is not None and x.grad.all()


def test_gradient_of_a_hidden_output_stays_in_the_blocks_before(name: str) -> None:
    network = made(name)
    x, u, labels = inputs()
    network(x, u, labels, frozenset({"hidden:2"}))["hidden:2"].square().sum().backward()
    prefixes = ("time.", "condition.", "body.embed.", "body.blocks.0.", "body.blocks.1.")
    assert owners(network) == {key for key, _ in network.named_parameters() if key.startswith(prefixes)}


def test_gradient_is_that_of_finite_differences(name: str) -> None:
    network = made(name, width=16)
    network = network.double()
    x, u, labels = (
        torch.randn(1, 4, 2, 4).double().requires_grad_(),
        torch.rand(1).double(),
        torch.tensor([1]),
    )
    weight = torch.randn(1, 4, 2, 4).double()

    def loss(at: Tensor) -> Tensor:
        return (network(at, u, labels)["prediction"] * weight).sum()

    grad = torch.autograd.grad(loss(x), x)[0]
    step = 1e-5 * torch.randn_like(x)
    with torch.no_grad():
        difference = (loss(x + step) - loss(x - step)) / 2
    torch.testing.assert_close((grad * step).sum(), difference, rtol=1e-5, atol=1e-12)


def gradients(network: nn.Module) -> dict[str, Tensor]:
    found = {key: p.grad.clone() for key, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    return found


def test_checkpointing_changes_no_gradient_and_computes_blocks_again(name: str) -> None:
    network = made(name)
    x, u, labels = inputs()
    network(x, u, labels)["prediction"].square().sum().backward()
    plain = gradients(network)
    recompute([network])
    ran: list[str] = []
    with Watched(network, ran):
        network(x, u, labels)["prediction"].square().sum().backward()
    assert ran.count("Attention") == 6  # recomputing a block may stop short of its end
    kept = gradients(network)
    assert kept.keys() == plain.keys()
    for key, grad in plain.items():
        torch.testing.assert_close(kept[key], grad)


def test_checkpointing_lets_gradient_through_parameters_that_get_none(name: str) -> None:
    """As the engine's ``through`` does: REPA-E's tokenizer step through a frozen generator."""
    network = made(name)
    recompute([network])
    x, u, labels = inputs()
    x.requires_grad_()
    frozen = {key: parameter.detach() for key, parameter in network.named_parameters()}
    found = torch.func.functional_call(network, frozen, (x, u, labels, frozenset({"hidden:2"})))
    found["hidden:2"].square().sum().backward()
    passed = x.grad
    assert passed is not None and passed.any() and not owners(network)
    x.grad = None
    network(x, u, labels, frozenset({"hidden:2"}))["hidden:2"].square().sum().backward()
    torch.testing.assert_close(x.grad, passed)


# ------------------------------------------------------------------------------------------ precision


def test_bfloat16_autocast_is_near_and_keeps_the_stream_in_float32(name: str) -> None:
    network = made(name)
    x, u, labels = inputs()
    want = frozenset({"prediction", "hidden:3"})
    exact = network(x, u, labels, want)
    with torch.autocast("cpu", torch.bfloat16):
        rough = network(x, u, labels, want)
    for key in want:
        assert rough[key].dtype == torch.float32
        off = (rough[key] - exact[key]).norm() / exact[key].norm()
        assert 0 < off < 0.1
    rough["prediction"].square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_network_of_another_dtype_answers_in_it(name: str, dtype: torch.dtype) -> None:
    network = made(name).to(dtype)
    x, u, labels = inputs()
    assert network(x.to(dtype), u, labels)["prediction"].dtype == dtype


def test_tables_made_without_gradient_serve_training_too(name: str) -> None:
    network = made(name)
    x, u, labels = inputs()
    with torch.inference_mode():
        network(x, u, labels)
    network(x, u, labels)["prediction"].sum().backward()


# ------------------------------------------------------------------------------------------ positions


def test_sines_and_cosines_by_hand() -> None:
    table = sincos((2, 3), 8)
    row = table[1 * 3 + 2]  # second row, third column
    frequencies = torch.tensor([1.0, 0.01], dtype=torch.float64)
    hand = [(2 * frequencies).sin(), (2 * frequencies).cos(), frequencies.sin(), frequencies.cos()]
    torch.testing.assert_close(row, torch.cat(hand))


def test_angles_by_hand() -> None:
    turns = angles((3, 5), 8, "grid")[1 * 5 + 4]
    torch.testing.assert_close(turns, torch.tensor([1.0, 0.01, 4.0, 0.04], dtype=torch.float64))
    turns = angles((3, 5), 8, "span")[1 * 5 + 4]
    torch.testing.assert_close(turns, torch.tensor([8.0, 0.08, 16.0, 0.16], dtype=torch.float64))
    assert angles((1, 1), 8, "span").tolist() == [[0.0] * 4]

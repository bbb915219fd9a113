"""Parity of the generators with their public implementations, through the importers.

Tolerances are those of the READMEs of the golden values. Some cases travel with the repository; ``VTP_GOLDEN`` names a
folder that holds them all.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import vtp_dit
from vtp_dit import importers
from vtp_dit.importers import Family
from vtp_dit.layouts import _turns
from vtp_dit.positions import Rotation, sincos

GOLDEN = Path(os.environ.get("VTP_GOLDEN", Path(__file__).parents[1] / "golden"))
GENERATORS: dict[str, Any] = {
    "dit": vtp_dit.DiT, "sit": vtp_dit.SiT, "lightningdit": vtp_dit.LightningDiT,
    "ddt": vtp_dit.DDT, "dit_dh": vtp_dit.DiTDH,
}  # fmt: skip
EVERYTHING = frozenset({"prediction", "state", *(f"hidden:{k}" for k in range(1, 5))})


@dataclass(frozen=True)
class Weights:
    """A stored state dict and how it is imported."""

    file: str
    family: Family
    known: dict[str, Any] = field(default_factory=dict)

    def load(self) -> dict[str, Tensor]:
        path = GOLDEN / f"{self.file}.safetensors"
        if not path.is_file():
            pytest.skip(f"{self.file} does not travel with the repository; set VTP_GOLDEN")
        tensors = load_file(path)
        if "final_layer.linear.weight" not in tensors:
            pytest.skip(f"only a part of {self.file} travels with the repository; set VTP_GOLDEN")
        return tensors

    def network(self) -> Any:
        options, tensors = self.family.to_ours(self.load(), **self.known)
        network = GENERATORS[self.family.generator](self.family.spec_of(tensors, options), **options)
        network.load_state_dict(tensors)
        return network.eval()


WEIGHTS = {
    "dit": Weights("dit/weights", importers.DIT, {"heads": 4}),
    "sit": Weights("sit/weights", importers.SIT, {"heads": 4}),
    "base": Weights("lightningdit/weights_base", importers.LIGHTNINGDIT),
    "qknorm": Weights("lightningdit/weights_qknorm", importers.LIGHTNINGDIT),
    "lnmlp": Weights("lightningdit/weights_lnmlp", importers.LIGHTNINGDIT),
    "ddt": Weights("ddt/weights", importers.DDT, {"encoder_blocks": 3}),
    "flat": Weights("ddt/weights_flat", importers.DDT_FLAT),
    "dh": Weights("dit_dh/weights", importers.DIT_DH),
    "guide": Weights("dit_dh/weights_guide", importers.DIT_DH),
    "light": Weights("dit_dh/weights_light", importers.LIGHTNINGDIT),
    "repa": Weights("repa_vavae/repa_sit.weights", importers.REPA, {"heads": 4}),
    "repa_e": Weights("repa_e/weights_sit", importers.REPA, {"heads": 3}),
    "repa_plain": Weights("repa_e/weights_repa_sit", importers.REPA, {"heads": 3}),
}


def stored(system: str, name: str = "forward") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Inputs and outputs, and the configuration they were made with."""
    path = GOLDEN / system / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"{system}/{name} does not travel with the repository; set VTP_GOLDEN")
    with safe_open(path, "pt") as file:
        return load_file(path), json.loads((file.metadata() or {}).get("config", "{}"))


def near(ours: Tensor, theirs: Tensor, atol: float = 5e-5) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


def taps(found: dict[str, Tensor], io: dict[str, Tensor], prefix: str = "") -> None:
    for key, theirs in io.items():
        name, _, block = key.rpartition("block")
        if name == f"out.{prefix}tap.":
            near(found[f"hidden:{int(block) + 1}"], theirs)


@pytest.fixture(autouse=True)
def without_gradient() -> Any:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_go_to_ours_and_back_byte_by_byte(name: str) -> None:
    case = WEIGHTS[name]
    theirs = case.load()
    options, ours = case.family.to_ours(theirs, **case.known)
    back = case.family.to_theirs(ours, options) | case.family.others(theirs)
    assert back.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert back[key].dtype == tensor.dtype and torch.equal(back[key], tensor), key


@pytest.mark.parametrize("name", ["dit", "base", "ddt", "dh"])
def test_half_precision_goes_and_comes_back_too(name: str) -> None:
    case = WEIGHTS[name]
    theirs = {key: tensor.bfloat16() for key, tensor in case.load().items()}
    options, ours = case.family.to_ours(theirs, **case.known)
    back = case.family.to_theirs(ours, options)
    assert all(torch.equal(back[key], tensor) for key, tensor in theirs.items())


@pytest.mark.parametrize("name", ["dit", "sit", "base", "ddt", "dh"])
def test_what_our_constructors_draw_can_be_exported_and_imported(name: str) -> None:
    case = WEIGHTS[name]
    options, tensors = case.family.to_ours(case.load(), **case.known)
    fresh = GENERATORS[case.family.generator](case.family.spec_of(tensors, options), **options).state_dict()
    theirs = case.family.to_theirs(fresh, options)
    again, back = case.family.to_ours(theirs, **case.known)
    assert again == options
    assert back.keys() == fresh.keys() and all(torch.equal(back[key], fresh[key]) for key in fresh)


def test_dit_equals_the_reference_at_whole_and_fractional_timesteps() -> None:
    network, (io, _) = WEIGHTS["dit"].network(), stored("dit")
    want = frozenset({"prediction", "variance", "hidden:1", "hidden:2", "hidden:3"})
    for t, out in (("in.t", "out.forward"), ("in.t_float", "out.forward_float_t")):
        found = network(io["in.x"], (io[t].float() + 1) / 1000, io["in.y"], want)
        near(torch.cat([found["prediction"], found["variance"]], 1), io[out])
        if t == "in.t":
            taps(found, io)


def test_dits_guided_forward_follows_from_one_doubled_batch() -> None:
    network, (io, config) = WEIGHTS["dit"].network(), stored("dit")
    u = (io["in.cfg_t"].float() + 1) / 1000
    x = io["in.cfg_x"].chunk(2)[0].repeat(2, 1, 1, 1)
    found = network(x, u, io["in.cfg_y"], frozenset({"prediction", "variance"}))
    pair = torch.cat([found["prediction"], found["variance"]], 1)
    near(pair, io["out.forward_unguided_pair"])
    near(first_channels_guided(pair, config["cfg_scale"]), io["out.forward_with_cfg"], 2e-4)


def first_channels_guided(pair: Tensor, scale: float) -> Tensor:
    given, null = pair[:, :3].chunk(2)
    return torch.cat([(null + scale * (given - null)).repeat(2, 1, 1, 1), pair[:, 3:]], 1)


def test_sit_equals_the_reference_with_its_time_turned() -> None:
    network, (io, config) = WEIGHTS["sit"].network(), stored("sit")
    found = network(
        io["in.x"], 1 - io["in.t"], io["in.y"], frozenset({"prediction", "hidden:1", "hidden:2", "hidden:3"})
    )
    near(-found["prediction"], io["out.forward"])
    taps(found, io)
    x = io["in.cfg_x"].chunk(2)[0].repeat(2, 1, 1, 1)
    pair = -network(x, 1 - io["in.cfg_t"], io["in.cfg_y"])["prediction"]
    near(first_channels_guided(pair, config["cfg_scale"]), io["out.forward_with_cfg"])


@pytest.mark.parametrize("variant", ["base", "qknorm", "lnmlp"])
def test_lightningdit_equals_the_reference(variant: str) -> None:
    network, (io, config) = WEIGHTS[variant].network(), stored("lightningdit")
    want = frozenset({"prediction", *(f"hidden:{k}" for k in range(1, network.depth + 1))})
    found = network(io["in.x"], 1 - io["in.t"], io["in.y"], want)
    near(-found["prediction"], io[f"out.{variant}.forward"], 2e-5)
    taps(found, io, f"{variant}.")
    x = io["in.cfg_x"].chunk(2)[0].repeat(2, 1, 1, 1)
    pair = -network(x, torch.tensor([1 - config["cfg_t_inside"]]), io["in.cfg_y"])["prediction"]
    near(first_channels_guided(pair, config["cfg_scale"]), io[f"out.{variant}.forward_with_cfg"], 2e-4)


def test_ddt_equals_the_reference_and_reuses_its_state() -> None:
    network, (io, _) = WEIGHTS["ddt"].network(), stored("ddt")
    found = network(io["in.x"], 1 - io["in.t"], io["in.y"], EVERYTHING)
    near(-found["prediction"], io["out.v"])
    near(found["state"], io["out.s"])
    taps(found, io)
    later = network(io["in.x"], 1 - io["in.t2"], io["in.y"], state=found["state"])["prediction"]
    near(-later, io["out.v_reuse_s_other_t"])
    later = network(0.5 * io["in.x"], None, None, state=found["state"])["prediction"]
    near(-later, io["out.v_reuse_s_other_x_y"], 1e-4)


def test_ddt_equals_the_reference_on_a_grid_that_is_no_square() -> None:
    network, (io, _) = WEIGHTS["ddt"].network(), stored("ddt")
    found = network(io["in.x_rect"], 1 - io["in.t"], io["in.y"], EVERYTHING)
    near(-found["prediction"], io["out.v_rect"])
    near(found["state"], io["out.s_rect"])


def test_the_undivided_network_of_ddt_is_a_lightningdit_with_other_switches() -> None:
    network, (io, _) = WEIGHTS["flat"].network(), stored("ddt")
    near(-network(io["in.x"], 1 - io["in.t"], io["in.y"])["prediction"], io["out.flat_dit_forward"])


def test_dit_dh_equals_the_reference_and_reuses_its_state() -> None:
    network, (io, config) = WEIGHTS["dh"].network(), stored("dit_dh")
    found = network(io["in.x"], io["in.t"], io["in.y"], EVERYTHING)
    near(found["prediction"], io["out.forward"], 1e-4)
    near(found["state"], io["out.s"])
    taps(found, io)
    reused = network(0.7 * io["in.x"], None, None, state=found["state"])["prediction"]
    near(reused, io["out.forward_reuse_s"], 1e-4)
    x = io["in.cfg_x"].chunk(2)[0].repeat(2, 1, 1, 1)
    given, null = network(x, io["in.cfg_t"], io["in.cfg_y"])["prediction"].chunk(2)
    guided = (null + config["cfg_scale"] * (given - null)).repeat(2, 1, 1, 1)
    near(guided, io["out.forward_with_cfg"], 2e-4)


def test_a_weaker_dit_dh_guides_as_the_reference_does() -> None:
    strong, weak, (io, config) = WEIGHTS["dh"].network(), WEIGHTS["guide"].network(), stored("dit_dh")
    good, bad = (network(io["in.x"], io["in.t"], io["in.y"])["prediction"] for network in (strong, weak))
    near(bad, io["out.guide_forward"], 1e-4)
    near(bad + config["ag_scale"] * (good - bad), io["out.forward_with_autoguidance"], 1e-4)


def test_raes_lightningdit_is_known_by_its_frequencies() -> None:
    network, (io, _) = WEIGHTS["light"].network(), stored("dit_dh")
    assert network.switches.time == "fourier" and not network.flip
    near(network(io["in.x"], io["in.t"], io["in.y"])["prediction"], io["out.lightningdit_forward"])


def test_repas_sit_equals_the_reference_and_hands_its_projector_over() -> None:
    case, (io, _) = WEIGHTS["repa"], stored("repa_vavae", "repa_sit")
    ours = case.network()(io["out.x_t"], io["in.t"], io["in.y"])["prediction"]
    assert float((ours - io["out.v_pred"]).norm() / io["out.v_pred"].norm()) < 1e-5
    assert {key.split(".")[0] for key in case.family.others(case.load())} == {"projectors"}


def test_repa_es_sit_equals_the_reference() -> None:
    case, (io, _) = WEIGHTS["repa_e"], stored("repa_e", "sampling")
    u = torch.tensor([0.37])
    found = case.network()(io["in.z"], u, io["in.y"], frozenset({"prediction", "hidden:2"}))
    near(found["prediction"], io["out.inference"])
    near(found["hidden:2"], io["out.forward_feats"])
    assert {key.split(".")[0] for key in case.family.others(case.load())} == {"projectors", "bn"}
    io, _ = stored("repa_e", "repa")
    plain = WEIGHTS["repa_plain"].network()
    near(plain(io["in.x"], io["in.t"].flatten(), io["in.y"])["prediction"], io["out.model_output"])


def test_the_rotation_is_the_references_with_channels_in_another_order() -> None:
    io, _ = stored("lightningdit")
    order = _turns(12, "axes")
    tables = Rotation(12, 2, "grid").tables((8, 8), io["out.rope.q"])
    near(tables.rotate(io["out.rope.q"][..., order]), io["out.rope.rotated"][..., order], 1e-5)
    io, _ = stored("ddt")
    for grid, key in (((4, 4), "square"), ((4, 6), "rect")):
        tables = Rotation(12, 2, "span").tables(grid, io["in.x"])
        theirs = io[f"out.rope_freqs_{key}"].repeat_interleave(2, dim=1)[:, _turns(12, "mixed")]
        near(torch.stack([tables.cos, tables.sin], -1), theirs, 2e-6)


def test_a_trained_position_table_becomes_a_learned_one() -> None:
    case = WEIGHTS["dit"]
    theirs = case.load()
    theirs["pos_embed"] = theirs["pos_embed"] + 0.1
    options, ours = case.family.to_ours(theirs, heads=4)
    assert options["positions"] == "learned" and options["grid"] == (8, 8)
    network = vtp_dit.DiT(case.family.spec_of(ours, options), **options)
    network.load_state_dict(ours)
    assert torch.equal(case.family.to_theirs(ours, options)["pos_embed"], theirs["pos_embed"])
    near(network.body.places.table, sincos((4, 4), 64).float() + 0.1, 1e-6)


def test_tensors_that_do_not_belong_are_refused_by_name_and_shape() -> None:
    case = WEIGHTS["base"]
    theirs = case.load()

    def refused(match: str, tensors: dict[str, Tensor]) -> None:
        with pytest.raises(ValueError, match=match):
            case.family.to_ours(tensors)

    refused(r"unknown: extra\.weight \(3, 2\)", theirs | {"extra.weight": torch.zeros(3, 2)})
    without = {key: tensor for key, tensor in theirs.items() if key != "blocks.1.attn.proj.bias"}
    refused(r"missing: blocks\.1\.attn\.proj\.bias \(48,\)", without)
    refused(
        r"another shape: .*norm_final\.weight \(7,\)",
        theirs | {"final_layer.norm_final.weight": torch.ones(7)},
    )
    refused(r"feat_rope\.freqs_cos: not the table", theirs | {"feat_rope.freqs_cos": torch.ones(64, 12)})
    refused(r"x_embedder\.proj\.weight is missing", {})
    options, ours = case.family.to_ours(theirs)
    with pytest.raises(ValueError, match=r"unknown: extra \(1,\)"):
        case.family.to_theirs(ours | {"extra": torch.zeros(1)}, options)
    del ours["final.proj.bias"]
    with pytest.raises(ValueError, match=r"missing: final\.proj\.bias"):
        case.family.to_theirs(ours, options)


def test_what_shapes_cannot_tell_is_asked_for() -> None:
    with pytest.raises(ValueError, match="heads: width 64 is not published"):
        importers.DIT.to_ours(WEIGHTS["dit"].load())
    with pytest.raises(ValueError, match="encoder_blocks: width 48 is not published"):
        importers.DDT.to_ours(WEIGHTS["ddt"].load())


def test_published_sizes_tell_what_shapes_do_not() -> None:
    spec = importers.DDT.spec_of(
        {"body.embed.proj.weight": torch.empty(0, 16), "condition.table.weight": torch.empty(1001, 0)},
        {"patch": 2},
    )
    assert (spec.channels, spec.classes) == (4, 1000)
    options, _ = importers.DDT.to_ours(WEIGHTS["ddt"].load(), encoder_blocks=3)
    large = {
        "encoder_blocks": 20,
        "head_blocks": 4,
        "width": 1024,
        "head_width": 1024,
        "heads": 16,
        "head_heads": 16,
    }
    with torch.device("meta"):
        network = vtp_dit.DDT(spec, size="l")
        theirs = importers.DDT.to_theirs(network.state_dict(), {**options, **large})
        read, ours = importers.DDT.to_ours(theirs)
    assert read == {**options, **large}
    assert {key: value.shape for key, value in ours.items()} == {
        key: value.shape for key, value in network.state_dict().items()
    }

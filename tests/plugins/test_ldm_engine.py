"""The convolutional autoencoder in stacks and in the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rig import batch_of, built, engine_of, gradients, owners, seen_by, stack_of

from vtp_core.build import blueprint
from vtp_core.costs import cost
from vtp_core.errors import StackFault
from vtp_core.modalities import Image
from vtp_core.stack import check_stack
from vtp_core.tokenizer import Tokenizer
from vtp_plugins.registry import Registry

SMALL: dict[str, Any] = {"channels": 4, "multipliers": [1, 2, 2], "blocks": 1, "attention": [8], "groups": 2}
SECTIONS: dict[str, Any] = {
    "modality": "image",
    "encoder": {"use": "ldm_cnn", **SMALL, "image_size": 32, "z_channels": 3},
    "bottleneck": {"use": "kl", "channels": 3},
    "decoder": {"use": "ldm_cnn", **SMALL},
}
RECONSTRUCTION: dict[str, Any] = {"lpips": 0.0, "space": "signed", "reduction": "sum"}


def test_the_divergence_trains_the_encoding_side_alone() -> None:
    engine = engine_of({"kl": {"weight": 0.1}}, 4, **SECTIONS)
    found, row = gradients(engine, batch_of(engine))
    assert owners(found) == {"encoder", "bottleneck"}
    assert row["kl/divergence"] > 0
    assert not [node for node in engine.plan().demands if node.kind == "decode"]


def test_a_step_decodes_the_draw_and_shares_one_forward() -> None:
    engine = engine_of(
        {
            "reconstruction": RECONSTRUCTION,
            "kl": {"weight": 1e-6},
            "read": {
                "want": "latent.sample", "crops": 1, "view": "image",
                "balance": {"against": "reconstruction", "at": "encoder.last", "max": 1e8},
            },
        },
        4, views={"image": {"use": "plain", "size": [32, 32]}}, **SECTIONS,
    )  # fmt: skip
    handed = seen_by(engine, "read")
    found, row = gradients(engine, batch_of(engine))
    assert owners(found) == {"encoder", "bottleneck", "decoder"}
    assert all(count == 1 for count in engine.last_runs.values()) and len(engine.last_runs) == 4
    assert row["weight/read"] > 0
    assert handed[0]["x"]["latent.sample"].shape == (1, 4, 64, 3)


def test_a_model_of_this_kind_learns() -> None:
    engine = engine_of(
        {"reconstruction": {"lpips": 0.0, "l1": 0.0, "l2": 1.0}, "kl": {"weight": 1e-6}}, 4,
        train={"steps": 12, "optim": {"lr": 0.005, "warmup": 0, "schedule": "constant"}}, **SECTIONS,
    )  # fmt: skip
    given = batch_of(engine)
    rows = [engine.step(given) for _ in range(12)]
    assert rows[-1]["reconstruction/l2"] < 0.9 * rows[0]["reconstruction/l2"]


def test_encode_gives_the_mean() -> None:
    model = built(stack_of({"kl": {}}, **SECTIONS))
    tok, images = Tokenizer(model).eval(), torch.rand(2, 3, 32, 32)
    z = tok.encode(images)
    assert z.shape == (2, 3, 8, 8) and torch.equal(z, tok.encode(images))
    assert tok.decode(z).shape == images.shape
    mean, _ = tok.bottleneck(tok.encoder(Image().normalise(images))["patches"])["posterior"]
    assert torch.equal(z, mean.transpose(1, 2).unflatten(2, (8, 8)))
    assert not any("range" in name for name in tok.state_dict())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_it_trains_in_every_precision(precision: str) -> None:
    kl = {"balance": {"against": "reconstruction", "at": "encoder.last"}}
    engine = engine_of(
        {"reconstruction": RECONSTRUCTION, "kl": kl}, 4, train={"precision": precision}, **SECTIONS
    )
    rows = [engine.step(batch_of(engine, step)) for step in range(2)]
    assert all(row["kl/divergence"] > 0 and row["weight/kl"] > 0 for row in rows)


def test_a_plan_counts_it_without_weights() -> None:
    stack = stack_of(
        {"kl": {}, "reconstruction": RECONSTRUCTION}, **SECTIONS, data={"use": "emoji", "batch_size": 4}
    )
    counted, _ = cost(stack)
    assert counted.parameters["encoder"] > 0 and counted.step_flops > 0


def test_a_masked_objective_is_refused_by_name() -> None:
    head = {"prototypes": 8, "hidden": 8, "bottleneck": 4}
    engine = engine_of({"ibot": head}, 4, **SECTIONS)
    with pytest.raises(StackFault, match="masked objectives need encoder"):
        engine.step(batch_of(engine))


def test_the_stack_of_the_readme_is_sound() -> None:
    text = (Path(__file__).parents[2] / "plugins" / "ldm" / "README.md").read_text()
    config = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    plans = blueprint(check_stack("va-vae", {"modality": "image", "size": "b", **config}, Registry()))
    assert plans.encoder is not None and plans.encoder.name == "ldm_cnn"
    tiny = {
        "modality": "image", "encoder": {"use": "ldm_cnn"}, "bottleneck": {"use": "kl", "channels": 4},
        "decoder": {"use": "ldm_cnn"},
    }  # fmt: skip
    spec = built(check_stack("tiny", {**tiny, "objectives": {"kl": {}}}, Registry())).spec
    assert (spec.size, spec.patch, spec.channels) == ((64, 64), (8, 8), 4)


def test_an_anchor_that_does_not_exist_is_suggested() -> None:
    keys = {"balance": {"against": "reconstruction", "at": "encoder.lst"}}
    engine = engine_of({"reconstruction": RECONSTRUCTION, "kl": keys}, 4, **SECTIONS)
    with pytest.raises(StackFault, match=r"encoder\.last"):
        engine.step(batch_of(engine))

"""VTP with our own plugins: one planned step against separate full forwards and a sum written by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from rig import close, gradients
from torch import Tensor

from vtp_core.build import blueprint, build
from vtp_core.clock import StepClock
from vtp_core.engine import Engine
from vtp_core.forwards import Inputs
from vtp_core.stack import check_stack
from vtp_plugins.needs import Outputs
from vtp_plugins.registry import Registry

HEAD = {"prototypes": 24, "hidden": 16, "bottleneck": 8}
WEIGHTS = {"clip": 1.0, "dino": 0.8, "ibot": 0.9, "koleo": 0.1, "reconstruction": 0.3}
OBJECTIVES: dict[str, Any] = {
    "clip": {"width": 16, "depth": 1, "heads": 2, "context": 16, "embedding": 8, "vocabulary": 600},
    "dino": {"rows": 0.5, "head": "prototypes", "local_crops": 2, "local_size": 16},
    "ibot": {"rows": 0.5, "head": "prototypes"},
    "koleo": {"rows": 0.25},
    "reconstruction": {"rows": 0.25, "l2": 0.5, "lpips": 1.0, "trunk": "random", "allow_random_trunk": True},
}
CAPTIONS = (
    "a red circle",
    "two blue squares",
    "nothing at all",
    "a dog",
    "the sun",
    "cats",
    "a house",
    "rain",
)


def vtp(on: str = "full", batch: int = 8, **train: Any) -> Engine:
    objectives = {name: {**options, "weight": WEIGHTS[name]} for name, options in OBJECTIVES.items()}
    if on == "latent":  # understanding on the latent, VTP's bottleneck_ae_only=False
        for name, output in zip(
            OBJECTIVES, ["latent.cls", "latent.cls", "latent", "latent.cls"], strict=False
        ):
            objectives[name]["on"] = output
    pooled = {"latent": "latent.cls", "full": "cls"}[on]
    config = {
        "modality": "image",
        "encoder": {"use": "vit", "patch": 8, "image_size": 32, "width": 16, "depth": 3, "heads": 2},
        "bottleneck": {"use": "linear", "channels": 4},
        "decoder": {"use": "vit_pixels", "width": 16, "depth": 1, "heads": 2},
        "modules": {"prototypes": {"use": "prototype_head", "on": pooled, **HEAD}},
        "objectives": objectives,
        "train": {"precision": "float64", "steps": 20, "max_grad_norm": None, **train},
    }  # fmt: skip
    stack = check_stack("vtp", config, Registry())
    return Engine(build(blueprint(stack)), stack.train, batch)


def batch_for(engine: Engine) -> Inputs:
    torch.manual_seed(0)
    views = {}
    for name, rows in engine.layout.rows_by_view().items():
        view = engine.model.views[name]
        if view.field == "text":
            views[name] = torch.stack([view(caption) for caption in CAPTIONS[:rows]])
        else:
            side = 16 if name == "local" else 32
            views[name] = torch.rand(rows, view.crops, 3, side, side, dtype=torch.float64)
    return Inputs(views, {})


def naive(engine: Engine, batch: Inputs, on: str) -> dict[str, Tensor]:
    """Every objective with whole forwards of its own, then the weighted sum; gradients by parameter."""
    model = engine.model
    encoder, bottleneck, decoder, head = (
        copy.deepcopy(m) for m in (model.encoder, model.bottleneck, model.decoder, model.shared["prototypes"])
    )
    teacher, teacher_neck = copy.deepcopy(encoder).eval(), copy.deepcopy(bottleneck).eval()
    objectives = copy.deepcopy(model.objectives)
    for name in ("dino", "ibot"):
        objectives[name].bind_shadows({"head": copy.deepcopy(head)})
        objectives[name].head = head
    clock = engine._clock(0)
    mask = engine.layout.samplers["block"](2, 4, (4, 4), clock.of("mask/block"))

    def features(
        view: str, rows: int, who: Any = encoder, neck: Any = bottleneck, hidden: Tensor | None = None
    ) -> Outputs:
        x = batch.views[view][:rows]
        crops = x.shape[1]
        flat = None if hidden is None else hidden[:, :rows].transpose(0, 1).flatten(0, 1)
        signal = model.modality.normalise(x.flatten(0, 1))
        found = who(signal, mask=flat)
        if on == "latent":
            latent = neck(found["patches"])["latent"]
            found = {"latent.cls": neck(found["cls"][:, None])["latent"][:, 0], "latent": latent}
        values = {k: v.unflatten(0, (rows, crops)).transpose(0, 1) for k, v in found.items()}
        return Outputs({**values, "input": signal.unflatten(0, (rows, crops)).transpose(0, 1)}, hidden)

    def masked(outputs: Outputs, key: str) -> Outputs:
        return Outputs({f"{key}@block": outputs[key][mask]}, mask)

    with torch.no_grad():
        taught = features("global", 4, teacher, teacher_neck)
    plain = {"latent": "latent", "full": "patches"}[on]
    image = features("image", 2)
    x = image["input"].squeeze(0)
    z = bottleneck(encoder(x)["patches"])["carried"].transpose(1, 2).unflatten(2, (4, 4))
    got = {
        "clip": {"image": features("image", 8), "text": Outputs({"input": batch.views["tokens"]})},
        "dino": {"student": features("global", 4, hidden=mask), "teacher": taught,
                 "local": features("local", 4)},
        "ibot": {
            "student": masked(features("global", 4, hidden=mask), plain), "teacher": masked(taught, plain)
        },
        "koleo": {"student": features("global", 2, hidden=mask)},
        "reconstruction": {"image": Outputs({"decoded": decoder(z)["decoded"][None], "input": x[None]})},
    }  # fmt: skip
    losses = {
        name: WEIGHTS[name] * sum(o(got[name], clock.of(name)).values()) for name, o in objectives.items()
    }
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    named = {
        "encoder": encoder,
        "bottleneck": bottleneck,
        "decoder": decoder,
        "modules/prototypes": head,
        **objectives,
    }
    found = {
        f"{o}.{n}": p.grad for o, m in named.items() for n, p in m.named_parameters() if p.grad is not None
    }
    return {**found, "loss": total.detach()}


@pytest.mark.parametrize("on", ["full", "latent"])
def test_a_planned_step_of_vtp_equals_the_naive_step(on: str) -> None:
    engine = vtp(on)
    batch = batch_for(engine)
    expected = naive(engine, batch, on)
    found, row = gradients(engine, batch)
    assert row["loss"] == pytest.approx(expected.pop("loss").item(), rel=1e-10)
    close(found, expected)
    assert {str(node): count for node, count in engine.last_runs.items() if node.kind == "encode"} == {
        "encoder(image)": 1,  # CLIP and reconstruction
        "encoder(global, mask block)": 1,  # DINO, iBOT and KoLeo
        "encoder(global, ema)": 1,  # DINO and iBOT
        "encoder(local)": 1,
    }


def test_vtp_learns_and_its_teacher_follows() -> None:
    engine = vtp(optim={"warmup": 0, "lr": 3e-3, "schedule": "constant"})
    batch = batch_for(engine)
    before = engine.ema.modules["encoder"].norm.weight.clone()
    rows = [engine.step(batch) for _ in range(10)]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert not torch.equal(engine.ema.modules["encoder"].norm.weight, before)


def test_drop_path_is_drawn_by_row_for_any_split() -> None:
    """Micro-batches meet the draws of the whole batch."""
    clocks = [StepClock(micro=m, micros=2).of("encoder/image/student/None") for m in range(2)]
    whole = StepClock().of("encoder/image/student/None").uniform("drop_path", 8, 3, 2)
    for micro, clock in enumerate(clocks):
        assert torch.equal(clock.uniform("drop_path", 4, 3, 2), whole[micro::2])

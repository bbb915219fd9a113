"""CLIP against open_clip: losses, two processes, text tower, tokenizer."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from vtp_clip import Clip
from vtp_core.clock import StepClock
from vtp_core.nn.chunked import contrastive
from vtp_core.nn.text import Tokens, build_tower, encode_text, tokenizer
from vtp_plugins import Outputs, Spec

GOLDEN = Path(__file__).parents[1] / "golden" / "open_clip_losses"
CLOCK = StepClock()
CAPTIONS = ["grinning face", "a red circle", "pile of poo; naïve café, 12 o'clock!", ""]
SMALL = {"width": 32, "depth": 2, "heads": 2, "context": 16, "embedding": 24, "vocabulary": 1024}
Off = Callable[[Tensor, Tensor], float]


def clip(**options: Any) -> Clip:
    return Clip(Spec(width=8, channels=5), **{**SMALL, **options})


def got_of(objective: Clip, image: Tensor) -> dict[str, Outputs]:
    tokens = torch.stack([objective.tokens(caption) for caption in CAPTIONS])
    return {"image": Outputs({objective.on: image}), "text": Outputs({"input": tokens})}


@pytest.mark.parametrize(("form", "name"), [("softmax", "clip"), ("sigmoid", "siglip")])
def test_two_processes_equal_the_whole_batch_of_open_clip(
    form: Any, name: str, ranks: Callable[..., list[Any]], off: Off
) -> None:
    stored = load_file(GOLDEN / "two_rank.safetensors")
    leaves = {key: stored[f"in.{key}"].requires_grad_() for key in ("W_image", "W_text")}
    leaves["logit_scale_log"] = stored[f"in.{name}_logit_scale_log"].requires_grad_()
    if form == "sigmoid":
        leaves["logit_bias"] = stored["in.siglip_logit_bias"].requires_grad_()

    def share(clock: StepClock) -> Tensor:
        rows = slice(clock.rank * 4, clock.rank * 4 + 4)
        image = F.normalize(stored["in.image_input"][rows] @ leaves["W_image"].T, dim=-1)
        text = F.normalize(stored["in.text_input"][rows] @ leaves["W_text"].T, dim=-1)
        return contrastive(
            image, text, leaves["logit_scale_log"].exp(), clock, leaves.get("logit_bias"), form
        )

    losses = ranks(2, share)
    case = "clip.local1_grad1" if form == "softmax" else None
    if case:
        for rank, loss in enumerate(losses):
            assert off(loss, stored[f"out.{case}.rank{rank}.loss"]) < 1e-5
    together = torch.stack(losses).mean()
    together.backward()
    assert off(together, stored[f"out.{name}.global.loss"]) < 1e-5
    for key, leaf in leaves.items():
        assert off(leaf.grad, stored[f"grad.{name}.global.{key}"]) < 1e-5, key


@pytest.mark.parametrize("name", ["text", "text_quick"])
def test_the_lean_text_tower_equals_open_clips_with_gradients(name: str, off: Off) -> None:
    from open_clip.transformer import QuickGELU, TextTransformer

    stored = load_file(GOLDEN / f"{name}.safetensors")
    if name == "text":
        tower: Any = build_tower(width=64, depth=2, heads=2, context=20, embedding=48, vocabulary=120)
    else:
        options = {"mlp_ratio": 3.0, "ls_init_value": 0.4, "proj_bias": True, "act_layer": QuickGELU}
        shape = {
            "context_length": 12,
            "vocab_size": 90,
            "width": 48,
            "heads": 3,
            "layers": 1,
            "output_dim": 32,
        }
        tower = TextTransformer(**shape, **options)
    tower.load_state_dict(load_file(GOLDEN / f"{name}.weights.safetensors"))
    features = encode_text(tower, stored["in.text"])
    (features * stored["in.cotangent"]).sum().backward()
    assert off(features, stored["out.text_features"]) < 1e-5
    for key, parameter in tower.named_parameters():
        assert float(parameter.grad.double().norm()) == pytest.approx(
            float(stored[f"gradnorm.{key}"]), rel=1e-5
        ), key
        if f"grad.{key}" in stored:
            assert off(parameter.grad, stored[f"grad.{key}"]) < 1e-5, key


def test_work_stops_at_the_longest_caption_and_values_stay() -> None:
    tower = build_tower(32, 3, 2, 77, 24, 1024)
    tokens = tokenizer(1024)(CAPTIONS, 77)
    torch.testing.assert_close(encode_text(tower, tokens), tower(tokens))
    torch.testing.assert_close(encode_text(tower, tokens[:, :40]), tower(tokens))


def test_the_whole_vocabulary_is_clips() -> None:
    from open_clip.tokenizer import SimpleTokenizer

    assert torch.equal(tokenizer()(CAPTIONS, 77), SimpleTokenizer()(CAPTIONS, 77))


def test_a_smaller_vocabulary_spells_the_same_text_with_more_tokens() -> None:
    for caption in CAPTIONS[:3]:
        ids = tokenizer(1024).encode(caption)
        assert max(ids) < 1022
        assert tokenizer(1024).decode(ids) == tokenizer().decode(tokenizer().encode(caption))
        assert len(ids) >= len(tokenizer().encode(caption))
    ends = tokenizer(1024)(CAPTIONS, 16)
    assert (ends.max(1).values == 1023).all() and (ends[:, 0] == 1022).all()
    with pytest.raises(ValueError, match="vocabulary"):
        tokenizer(100)


def test_a_long_caption_is_cut_and_still_ends() -> None:
    ids = Tokens(8, 1024)("one two three four five six seven eight nine ten")
    assert ids.shape == (8,) and ids[-1] == 1023


def test_the_token_view_pickles_and_compares_by_value() -> None:
    view = Tokens(16, 1024)
    view("warm the tokenizer")
    assert pickle.loads(pickle.dumps(view)) == view == Tokens(16, 1024) != Tokens(17, 1024)
    assert len(pickle.dumps(view)) < 500
    assert view.field == "text" and view.crops is None


def test_the_objective_equals_open_clips_loss() -> None:
    from open_clip.loss import ClipLoss

    objective = clip()
    image = torch.randn(1, 4, 8, requires_grad=True)
    ours = objective(got_of(objective, image), CLOCK)["contrast"]
    text = objective.embed_text(CAPTIONS)
    stored = ClipLoss()(objective.embed_image({"cls": image[0]}), text, objective.logit_scale.exp())
    torch.testing.assert_close(ours, stored)
    wanted = torch.autograd.grad(stored, [image, *objective.parameters()])
    for a, b in zip(torch.autograd.grad(ours, [image, *objective.parameters()]), wanted, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_sigmoid_starts_as_siglip_does_and_equals_open_clips_loss() -> None:
    from open_clip.loss import SigLipLoss

    objective = clip(loss="sigmoid")
    assert objective.logit_scale.item() == pytest.approx(math.log(10)) and objective.logit_bias == -10
    image = torch.randn(1, 4, 8)
    ours = objective(got_of(objective, image), CLOCK)["contrast"]
    both = objective.embed_image({"cls": image[0]}), objective.embed_text(CAPTIONS)
    stored = SigLipLoss()(*both, objective.logit_scale.exp(), objective.logit_bias)
    torch.testing.assert_close(ours, stored)


def test_the_scale_is_used_and_kept_at_most_100_and_can_come_back() -> None:
    objective = clip()
    image = torch.randn(1, 4, 8)
    with torch.no_grad():
        objective.logit_scale.fill_(math.log(100))
    exact = objective(got_of(objective, image), CLOCK)["contrast"]
    with torch.no_grad():
        objective.logit_scale.fill_(6.0)
    loss = objective(got_of(objective, image), CLOCK)["contrast"]
    torch.testing.assert_close(loss, exact)
    loss.backward()
    assert objective.logit_scale.grad != 0
    assert objective.logit_scale == 6.0, "forward changed a parameter"
    objective.settle(CLOCK)
    assert objective.logit_scale.item() == pytest.approx(math.log(100))


def test_embeddings_are_unit_vectors_of_any_output() -> None:
    for on, shape in {"cls": (3, 8), "latent.cls": (3, 5), "patches": (3, 9, 8), "latent": (3, 9, 5)}.items():
        embedded = clip(on=on).embed_image({on: torch.randn(shape)})
        torch.testing.assert_close(embedded.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(clip().embed_text(CAPTIONS).norm(dim=1), torch.ones(4))


def test_pooled_is_the_mean_of_patches() -> None:
    objective = clip(on="patches")
    patches = torch.randn(2, 9, 8)
    projected = F.normalize(patches.mean(1) @ objective.project.weight.T, dim=-1)
    torch.testing.assert_close(objective.embed_image({"patches": patches}), projected)


def test_it_insists_on_unmasked_images_and_brings_its_views() -> None:
    objective = clip()
    assert objective.needs["image"].mask is None and objective.needs["image"].want == {"cls"}
    assert set(objective.views) == {"image", "tokens"} and set(clip(view="other").views) == {"tokens"}

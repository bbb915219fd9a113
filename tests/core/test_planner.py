from __future__ import annotations

import pytest
from rig import batch_of, engine_of

from vtp_core.errors import StackFault
from vtp_core.planner import Plan, Reader, plan
from vtp_plugins.needs import Need

FLOW = Need("image", {"prediction", "target"}, "generator", None, cut=("latent",))


def planned(*readers: Reader, **keys: object) -> Plan:
    return plan(readers, **keys)  # type: ignore[arg-type]


def kinds(found: Plan, kind: str) -> list[str]:
    return [str(node) for node in found.demands if node.kind == kind]


def dino_family() -> list[Reader]:
    teacher = Need("global", "cls", "ema", None)
    masked = Need("global", "patches@block", mask="block")
    return [
        Reader(
            "dino", {"student": Need("global", "cls"), "teacher": teacher, "local": Need("local", "cls")}, 4
        ),
        Reader("ibot", {"student": masked, "teacher": Need("global", "patches@block", "ema", None)}, 4),
        Reader("koleo", {"student": Need("global", "cls")}, 2),
    ]


def test_dino_ibot_and_koleo_share_one_student_and_one_teacher_pass() -> None:
    found = planned(*dino_family())
    assert kinds(found, "encode") == ["encoder(global, mask block)", "encoder(global, ema)", "encoder(local)"]
    student = next(node for node in found.demands if node.mask == "block")
    assert found.demands[student].rows == {"cls": 4, "patches@block": 4}
    assert list(found.demands[student].readers) == ["dino", "ibot", "koleo"]
    assert len(found.stages) == 1
    assert found.masks == {"block"}


def test_the_engine_runs_what_the_planner_shares() -> None:
    engine = engine_of({"distil": {}, "masked": {}, "contrast": {"rows": 0.5}})
    engine.step(batch_of(engine))
    assert [call["want"] for call in engine.model.encoder.calls] == [{"cls": 16, "patches@some": 16}]
    assert [call["want"] for call in engine.ema.modules["encoder"].calls] == [{"cls": 16, "patches@some": 16}]


def test_any_takes_no_mask_where_nobody_masks() -> None:
    found = planned(Reader("dino", {"student": Need("global", "cls")}, 4))
    assert kinds(found, "encode") == ["encoder(global)"]


def test_a_need_without_mask_has_a_forward_of_its_own() -> None:
    found = planned(*dino_family(), Reader("plain", {"x": Need("global", "cls", mask=None)}, 4))
    assert "encoder(global)" in kinds(found, "encode")


def test_any_between_two_masks_is_an_error_that_names_both() -> None:
    readers = [Reader(n, {"x": Need("global", "cls", mask=n)}, 4) for n in ("one", "two")]
    assert len(kinds(planned(*readers), "encode")) == 2
    with pytest.raises(
        StackFault, match=r"objectives.three takes any mask.*'one' \(objectives.one\) and 'two'"
    ):
        planned(*readers, Reader("three", {"x": Need("global", "cls")}, 4))


def test_teachers_forget_drop_path_and_frozen_modules_run_in_eval_mode() -> None:
    readers = [
        Reader("a", {"x": Need("image", "cls", "ema", None, drop=0.1)}, 4),
        Reader("b", {"x": Need("image", "cls", "ema", None)}, 4),
        Reader("c", {"x": Need("image", {"decoded", "cls"}, mask=None)}, 4),
    ]
    found = planned(*readers, trains=lambda module: module == "decoder")
    assert kinds(found, "encode") == ["encoder(image, ema)", "encoder(image, eval)"]
    assert next(node for node in found.demands if node.kind == "bottleneck").mode == "train"  # noise stays
    assert {node.kind for node in found.live} == {"decode"}


def test_drop_path_of_its_own_is_a_forward_of_its_own() -> None:
    found = planned(*[Reader(f"d{d}", {"x": Need("image", "cls", drop=d)}, 4) for d in (None, 0.0, 0.3)])
    assert kinds(found, "encode") == [
        "encoder(image)",
        "encoder(image, drop 0.0)",
        "encoder(image, drop 0.3)",
    ]


def test_stages_are_split_by_cut_inputs_and_ordered_by_them() -> None:
    found = planned(Reader("flow", {"x": FLOW}, 4), Reader("rebuild", {"x": Need("image", "decoded")}, 4))
    assert [stage.readers for stage in found.stages] == [("rebuild",), ("flow",)]
    assert [node.kind for node in found.stages[0].nodes] == ["encode", "bottleneck", "decode"]
    assert [node.kind for node in found.stages[1].nodes] == ["generate"]
    assert [node.kind for node in found.stages[0].keep] == ["bottleneck"]
    assert found.stages[1].keep == frozenset()


def test_nothing_is_live_that_only_cut_inputs_read() -> None:
    found = planned(Reader("flow", {"x": FLOW}, 4))
    assert {node.kind for node in found.live} == {"generate"}


def test_an_uncut_latent_joins_the_generator_to_the_tokenizer() -> None:
    uncut = Need("image", {"prediction", "target"}, "generator", None)
    found = planned(
        Reader("flow", {"x": uncut}, 4), Reader("rebuild", {"x": Need("image", "decoded", mask=None)}, 4)
    )
    assert [stage.readers for stage in found.stages] == [("flow", "rebuild")]
    assert len(kinds(found, "bottleneck")) == 1


def test_through_passes_gradient_and_a_cut_after_it_leaves_nothing_live() -> None:
    through = Need("image", "hidden:1", "generator", None, through=("generator",))
    found = planned(Reader("align", {"x": through}, 4), Reader("flow", {"x": FLOW}, 4))
    assert kinds(found, "generate") == [
        "generator(image, no gradient to its parameters)", "generator(image, input cut)"
    ]  # fmt: skip
    assert [stage.readers for stage in found.stages] == [("align",), ("flow",)]
    closed = Need("image", "hidden:1", "generator", None, through=("generator",), cut=("latent",))
    assert planned(Reader("align", {"x": closed}, 4)).live == frozenset()


def test_the_mode_of_a_generator_need_is_the_generators_alone() -> None:
    evaluated = Need("image", "hidden:1", "generator", None, mode="eval", through=("generator",))
    found = planned(
        Reader("align", {"x": evaluated}, 4), Reader("rebuild", {"x": Need("image", "decoded", mask=None)}, 4)
    )
    assert kinds(found, "encode") == ["encoder(image)"]
    assert "generator(image, no gradient to its parameters, eval)" in kinds(found, "generate")


def test_a_balance_reference_joins_stages() -> None:
    readers = [
        Reader("a", {"x": Need("image", "decoded")}, 4),
        Reader("b", {"x": Need("other", "decoded")}, 4, against="a"),
    ]
    assert [stage.readers for stage in planned(*readers).stages] == [("a", "b")]


def test_repeats_redraw_the_generator_and_share_the_latent() -> None:
    found = planned(
        Reader("flow", {"x": FLOW}, 4, repeat=3),
        Reader("rebuild", {"x": Need("image", "decoded", mask=None)}, 4),
    )
    assert [node.draw for node in found.demands if node.kind == "generate"] == ["main", "main#1", "main#2"]
    assert len(kinds(found, "bottleneck")) == 1
    # every pass is a stage of its own, so that memory does not grow with the repeats
    assert [stage.turns for stage in found.stages] == [
        (("rebuild", 0),),
        *[((("flow", i),)) for i in range(3)],
    ]


def test_stages_that_read_each_others_cut_values_run_together() -> None:
    a = {
        "x": Need("a", "decoded", mask=None),
        "y": Need("b", "decoded", mask=None, cut=("latent",), through=("decoder",)),
    }
    b = {
        "x": Need("b", "decoded", mask=None),
        "y": Need("a", "decoded", mask=None, cut=("latent",), through=("decoder",)),
    }
    assert [s.readers for s in planned(Reader("a", a, 4), Reader("b", b, 4)).stages] == [("a", "b")]


def test_supplied_latents_need_no_encoder() -> None:
    readers = [
        Reader("flow", {"x": FLOW}, 4),
        Reader("rebuild", {"x": Need("image", {"decoded", "input"})}, 4),
    ]
    found = planned(*readers, provided=frozenset({"latent"}), fields=frozenset({"latent"}))
    assert not kinds(found, "encode")
    assert not kinds(found, "bottleneck")
    assert kinds(found, "input") == ["input(latent)", "input(image)"]


def test_only_learners_make_nodes_live() -> None:
    found = planned(Reader("fool", {"x": Need("image", "decoded")}, 4, learns=False))
    assert found.live == frozenset()
    assert found.watchers == {"fool"}


def test_one_forward_serves_as_many_rows_as_its_largest_reader_wants() -> None:
    readers = [
        Reader("a", {"x": Need("image", "patches")}, 2),
        Reader("b", {"x": Need("image", "latent")}, 8),
    ]
    encode = next(node for node in planned(*readers).demands if node.kind == "encode")
    assert planned(*readers).demands[encode].rows == {"patches": 8}


@pytest.mark.parametrize(
    ("need", "message"),
    [
        (Need("text", "cls"), "'text' is a raw field, whose only output is 'input'"),
        (Need("text", "latent"), "'text' is a raw field and has no latent"),
        (Need("image", "decoded", "ema"), "nothing gives an output 'decoded' of source 'ema'"),
        (Need("image", "logits"), "nothing gives an output 'logits'"),
        (Need("image", "prediction"), "nothing gives an output 'prediction' of source 'student'"),
    ],
)
def test_an_output_that_nothing_gives_is_an_error(need: Need, message: str) -> None:
    with pytest.raises(StackFault, match=f"objectives.mine: .*{message}"):
        planned(Reader("mine", {"x": need}, 4))


def test_the_plan_depends_on_nothing_but_the_needs() -> None:
    shown = [[str(node) for node in planned(*dino_family()).demands] for _ in range(2)]
    assert shown[0] == shown[1]

"""Mistakes and malice in a stack: a misspelt key meets the right one, and no string runs anything."""

from __future__ import annotations

import contextlib
import copy
import random
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from vtp_core import options
from vtp_core.errors import StackFault
from vtp_core.stack import KEYS, check_stack, load_stack
from vtp_plugins.registry import Registry

REGISTRY = Registry()
Place = tuple[str, ...]
TINY = load_stack("vtp-tiny", registry=REGISTRY).config
MODELS: dict[Place, Any] = {
    ("train",): options.Train,
    ("train", "optim"): options.Optim,
    ("train", "teacher"): options.Teacher,
    ("data",): options.Data,
    ("run",): options.Run,
    ("probes", "knn"): options.Probe,
    **{("objectives", name): options.Objective for name in TINY["objectives"]},
    ("objectives", "dino", "optim"): options.Optim,
}


def places_of(node: dict[str, Any], above: Place = ()) -> Iterator[Place]:
    """Every written key of a tree."""
    for key, child in node.items():
        yield (*above, key)
        if isinstance(child, dict):
            yield from places_of(child, (*above, key))


def below(tree: dict[str, Any], path: Iterable[str]) -> dict[str, Any]:
    """A node, made where there is none."""
    for key in path:
        tree = tree.setdefault(key, {})
    return tree


HOSTILE = [
    "os.system",
    "os:system",
    "__class__",
    "builtins.exec",
    "http://x.org/a",
    "../../etc/passwd",
    "a" * 500,
    "{{7*7}}",
    "\x00",
]


def test_no_string_in_a_stack_imports_or_runs_anything() -> None:
    rng = random.Random(0)
    places = list(places_of(TINY))
    before = set(sys.modules)
    for _ in range(300):
        tree = copy.deepcopy(TINY)
        *path, last = rng.choice(places)
        key = rng.choice(["_target_", "use", last, rng.choice(HOSTILE)])
        below(tree, path)[key] = rng.choice(HOSTILE)
        with contextlib.suppress(StackFault):
            check_stack("hostile", tree, REGISTRY)
    assert set(sys.modules) == before


def typo(word: str, rng: random.Random) -> str:
    """One letter dropped, doubled, exchanged with its neighbour, or replaced."""
    at = rng.randrange(len(word))
    letter = rng.choice("abcdefghijklmnopqrstuvwxyz_")
    return rng.choice(
        [
            word[:at] + word[at + 1 :],
            word[:at] + word[at] + word[at:],
            word[:at] + word[at : at + 2][::-1] + word[at + 2 :],
            word[:at] + letter + word[at + 1 :],
        ]
    )


def misspelt(rng: random.Random, places: list[Place]) -> tuple[dict[str, Any], str]:
    """vtp-tiny with one key misspelt, written or not, and the key."""
    while True:
        tree = copy.deepcopy(TINY)
        *path, word = rng.choice(places)
        wrong = typo(word, rng)
        if wrong not in {last for *above, last in places if above == path}:
            node = below(tree, path)
            node[wrong] = node.pop(word, None)
            return tree, word


def built_up_to_the_modules(tree: dict[str, Any]) -> None:
    """Every check that comes before a module is built."""
    stack = check_stack("vtp-tiny", tree, REGISTRY)
    from vtp_core import evaluation
    from vtp_core.build import blueprint

    blueprint(stack)
    evaluation.dataset_component(stack)
    evaluation.probe_components(stack)


def test_nearly_every_misspelt_key_is_told_with_the_right_one() -> None:
    from vtp_core.components import schema_of

    places = set(places_of(TINY)) | {(key,) for key in KEYS}
    for path, model in MODELS.items():
        places |= {(*path, key) for key in model.model_fields}
    for name, node in TINY["objectives"].items():
        options_of_it, modules = schema_of(REGISTRY.load("objectives", node.get("use", name)))
        places |= {("objectives", name, key) for key in (*options_of_it.model_fields, *modules)}
    rng, silent = random.Random(0), []
    for _ in range(200):
        tree, word = misspelt(rng, sorted(places))
        with pytest.raises(StackFault) as fault:
            built_up_to_the_modules(tree)
        if not any(told in str(fault.value) for told in (f"did you mean {word!r}", f"{word!r} is missing")):
            silent.append((word, str(fault.value)))
    assert len(silent) <= 10, silent

"""What the pages under docs/ say of keys, outputs, commands and codes is what the code says."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from pydantic import BaseModel

from vtp_core import Generator, errors, options
from vtp_core.blueprint import blueprint
from vtp_core.cli import app
from vtp_core.components import schema_of
from vtp_core.describe import documentation
from vtp_core.evaluation import dataset_component
from vtp_core.nodes import MODULES
from vtp_core.planner import DECODED, ENCODED, GENERATED, LATENT, family
from vtp_core.samplers.guidance import Guidance
from vtp_core.samplers.reuse import Reuse
from vtp_core.stack import KEYS, check_stack
from vtp_plugins import Clock, Need, Objective, protocols
from vtp_plugins.registry import KINDS, Registry

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = {page.stem: page.read_text(encoding="utf-8") for page in sorted(DOCS.glob("*.md"))}
MODELS: dict[str, type[BaseModel]] = {
    "train": options.Train,
    "train.optim": options.Optim,
    "train.teacher": options.Teacher,
    "data": options.Data,
    "objectives": options.Objective,
    "objectives.balance": options.Balance,
    "objectives.critic": options.Critic,
    "objectives.critic.optim": options.CriticOptim,
    "probes": options.Probe,
    "generator": options.Generator,
    "generator.ema": options.Ema,
    "sampler": options.Sampler,
    "sampler.guidance": Guidance,
    "sampler.reuse": Reuse,
    "tokenizer": options.Tokenizer,
    "run": options.Run,
}


def section(page: str, title: str) -> str:
    """The text below a heading, up to the next heading."""
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    assert found, f"docs/{page}.md has no section {title!r}"
    return found[1]


def table(page: str, title: str) -> dict[str, list[str]]:
    """The first table of a section: first cell without its backticks -> the other cells."""
    rows = re.findall(r"^\| (.*) \|$|^\| (.*) \| \|$", section(page, title), flags=re.MULTILINE)
    cells = [re.split(r"(?<!\\) ?\| ?", row[0] or row[1]) for row in rows]
    return {first.strip("`"): [cell.strip() for cell in rest] for first, *rest in cells[1:]}


def blocks(language: str, page: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], flags=re.DOTALL | re.MULTILINE)


def named(text: str) -> set[str]:
    """Everything in backticks."""
    return set(re.findall(r"`([^`]+)`", text))


# ---- the stack


def test_every_top_level_key_is_documented() -> None:
    assert set(table("stack", "Top level")) == KEYS


def test_every_reserved_key_of_a_component_is_documented() -> None:
    assert set(table("stack", "Any component")) == options.COMPONENT_KEYS
    told = set(table("stack", "objectives")) | set(table("stack", "Any component"))
    assert told >= options.OBJECTIVE_KEYS


def shown(default: Any) -> str:
    """A default as YAML writes it."""
    plain = list(default) if isinstance(default, tuple) else default
    text: str = yaml.safe_dump(plain, default_flow_style=True)
    return f"`{text.replace('...', '').strip()}`"


@pytest.mark.parametrize("title", MODELS)
def test_keys_and_defaults_are_those_of_the_code(title: str) -> None:
    rows, fields = table("stack", title), MODELS[title].model_fields
    fields = {field.alias or name: field for name, field in fields.items()}
    assert list(rows) == list(fields)
    for key, field in fields.items():
        default = rows[key][1]
        if field.is_required():
            assert default == "compulsory", key
        elif isinstance(field.default, BaseModel):
            assert default == "", key
        else:
            assert default == shown(field.default), key


def test_every_dial_is_documented() -> None:
    rows = {dial: [cell for cell in cells if cell] for dial, cells in table("stack", "size").items()}
    assert rows == {
        dial: [shown(sets[key]) for key in ("lr", "warmup")] for dial, sets in options.DIALS.items()
    }


def test_the_example_is_a_stack() -> None:
    check_stack("example", yaml.safe_load(blocks("yaml", "stack")[0]), Registry())


# ---- the contract


def test_every_kind_is_documented() -> None:
    assert tuple(table("contract", "Kinds")) == KINDS


def test_every_field_of_a_need_is_documented() -> None:
    fields = [field.name for field in dataclasses.fields(Need)]
    assert list(table("contract", "Needs")) == fields
    written = [
        p.name if p.default is p.empty else f"{p.name}={json.dumps(p.default) if p.default != () else '()'}"
        for p in inspect.signature(Need).parameters.values()
    ]
    call = f"`Need({', '.join(written)})`".replace("null", "None")
    assert call in section("contract", "Needs")


def test_every_output_is_documented_with_its_family() -> None:
    outputs = {name for row in table("contract", "Outputs") for name in re.split("` `|`", row)}
    known = ENCODED | LATENT | DECODED | GENERATED | {"input"}
    assert {family(output) for output in outputs} == known
    for output in outputs:
        assert output in (inspect.getdoc(Need) or ""), output


def test_every_module_that_gradient_may_pass_through_is_documented() -> None:
    assert named(table("contract", "Needs")["through"][0]) == set(MODULES.values())


def test_every_member_of_the_clock_is_documented() -> None:
    members = {name for name in vars(Clock) if not name.startswith("_")}
    told = {re.sub(r"\(.*", "", name) for row in table("contract", "Clock") for name in re.split("`, `", row)}
    assert told == members
    for row in table("contract", "Clock"):
        for name, arguments in re.findall(r"(\w+)\(([^)]*)\)", row):
            parameters = list(inspect.signature(getattr(Clock, name)).parameters.values())[1:]
            assert arguments == ", ".join(f"{'*' * (p.kind is p.VAR_POSITIONAL)}{p.name}" for p in parameters)


def test_every_member_of_a_field_is_documented() -> None:
    rows = [name.strip("`") for name in table("contract", "Paths, generators and samplers")]
    members = {name: value for name, value in vars(protocols.Field).items() if not name.startswith("_")}
    written = []
    for name, value in members.items():
        arguments = [] if isinstance(value, property) else list(inspect.signature(value).parameters)[1:]
        written.append(f"{name}({', '.join(arguments)})" if arguments else name)
    assert sorted(rows) == sorted(written)


def test_every_attribute_of_an_objective_is_documented() -> None:
    attributes = set(re.findall(r"^    (\w+): ", inspect.getdoc(Objective) or "", flags=re.MULTILINE))
    told = {name for row in table("contract", "Objectives") for name in re.split("`, `", row)}
    assert told == attributes
    assert named(section("contract", "Objectives")) >= options.OBJECTIVE_KEYS


def test_every_fault_is_documented() -> None:
    faults = {
        name
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.Fault)
    }
    assert faults - {"Fault"} <= named(section("contract", "Faults"))


# ---- the commands


def commands(group: Any, above: str = "vtp") -> Iterator[tuple[str, Any]]:
    """Every command by what is typed."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{above} {name}")
        else:
            yield f"{above} {name}", command


COMMANDS = dict(commands(typer.main.get_command(app)))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_documented_with_its_options(command: str) -> None:
    row = re.search(
        rf"^\| `{command}(?: [^`]*)?` \|.*$", section("commands", "The commands"), flags=re.MULTILINE
    )
    assert row, f"docs/commands.md has no row for {command}"
    for option in (name for parameter in COMMANDS[command].params for name in parameter.opts):
        assert not option.startswith("-") or option in row[0], option


def test_no_command_is_documented_that_does_not_exist() -> None:
    told = set(
        re.findall(r"^\| `(vtp [a-z]+(?: [a-z]+)?)", section("commands", "The commands"), flags=re.MULTILINE)
    )
    assert told == set(COMMANDS)


def test_every_exit_code_is_documented() -> None:
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.Fault)
    ]
    assert {int(code) for code in table("commands", "Exit codes")} == {kind.code for kind in kinds} | {
        0,
        75,
        130,
    }


# ---- generation

COMPONENTS = [entry for entry in Registry().entries() if entry.kind not in {"stacks", "importers"}]


@pytest.mark.parametrize("entry", COMPONENTS, ids=lambda entry: f"{entry.kind}/{entry.name}")
def test_every_option_of_a_component_is_explained(entry: Any) -> None:
    cls = entry.load()
    schema, modules = schema_of(cls)
    told = documentation(cls, {*schema.model_fields, *modules})
    for option in (*schema.model_fields, *modules):
        assert re.search(rf"^    {option}: ", told, flags=re.MULTILINE), option


@pytest.mark.parametrize(("kind", "title"), [("samplers", "Samplers"), ("paths", "Paths")])
def test_the_options_of_samplers_and_paths_are_those_of_the_code(kind: str, title: str) -> None:
    header = re.search(r"^\| option \| (.*) \| meaning \|$", section("generation", title), flags=re.MULTILINE)
    assert header
    columns = [re.findall(r"`(\w+)`", cell) for cell in header[1].split(" | ")]
    rows = {option: cells[: len(columns)] for option, cells in table("generation", title).items()}
    classes = {entry.name: entry.load() for entry in Registry().entries(kind)}
    assert {name for column in columns for name in column} == set(classes)
    for index, column in enumerate(columns):
        written = {option: cells[index] for option, cells in rows.items() if cells[index]}
        for name in column:
            fields = schema_of(classes[name])[0].model_fields
            assert written == {option: shown(field.default) for option, field in fields.items()}, name


@pytest.mark.parametrize("text", blocks("yaml", "generation"))
def test_the_parts_of_stacks_that_are_shown_hold(text: str) -> None:
    shown = {"encoder": {"use": "vit"}, "data": {"use": "emoji"}, **yaml.safe_load(text)}
    stack = check_stack("example", shown, Registry())
    blueprint(stack)
    dataset_component(stack)
    for key in ("guidance", "reuse"):
        given = (shown.get("sampler") or {}).get(key)
        assert given is None or {"guidance": Guidance, "reuse": Reuse}[key].model_validate(given)


@pytest.mark.parametrize("line", re.findall(r"^\$ vtp (.+)$", PAGES["generation"], flags=re.MULTILINE))
def test_the_commands_that_are_shown_parse(line: str) -> None:
    verb, *arguments = shlex.split(line)
    context = COMMANDS[f"vtp {verb}"].make_context(verb, arguments)
    overrides = context.params.get("overrides") or []
    assert all("=" in override for override in overrides), overrides


def test_the_python_that_is_shown_names_what_exists() -> None:
    (example,) = blocks("python", "generation")
    compile(example, "generation.md", "exec")
    for name in re.findall(r"\bgenerator\.(\w+)", example):
        assert hasattr(Generator, name) or name in {"tokenizer", "evaluations"}, name


# ---- pages


def anchors(text: str) -> set[str]:
    """What headings can be linked by."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^a-z0-9_ -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]+))?\)", PAGES[page]):
        path = (DOCS / target).resolve() if target else DOCS / f"{page}.md"
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), f"{target}#{anchor}"

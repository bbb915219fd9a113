"""The registry: everything installed is listed, nothing is imported until it is named."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vtp_plugins.errors import PluginFault, StackFault
from vtp_plugins.registry import KINDS, Entry, Registry

Install = Callable[..., None]
Write = Callable[[str, str], Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """``install(name, {group: {name: target}}, source)`` writes an installed distribution and its module."""
    folder = tmp_path / "installed"
    monkeypatch.syspath_prepend(folder)
    made: list[str] = []

    def run(name: str, groups: dict[str, dict[str, str]], source: str = "", version: str = "0.1.0") -> None:
        stem = name.replace("-", "_")
        info = folder / f"{stem}-{version}.dist-info"
        info.mkdir(parents=True)
        (folder / f"{stem}.py").write_text(source)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        lines = []
        for group, points in groups.items():
            lines += [f"[{group}]", *(f"{point} = {target}" for point, target in points.items())]
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
        importlib.invalidate_caches()
        made.append(stem)

    yield run
    for stem in made:
        sys.modules.pop(stem, None)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """``write(name, source)`` gives the path of a Python file."""

    def run(name: str, source: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
        return path

    return run


# ---- listing


def test_listing_imports_nothing(install: Install) -> None:
    install(
        "acme-loss", {"vtp_plugins.objectives": {"acme": "acme_loss:Acme"}}, "raise SystemExit('imported')"
    )
    found = {(entry.kind, entry.name): entry for entry in Registry().entries()}
    assert found["objectives", "acme"] == Entry("objectives", "acme", "acme_loss:Acme", "acme-loss 0.1.0")
    assert "acme_loss" not in sys.modules


def test_entries_come_by_kind_and_name(install: Install) -> None:
    install(
        "acme", {"vtp_plugins.hooks": {"b": "acme:B", "a": "acme:A"}, "vtp_plugins.views": {"z": "acme:Z"}}
    )
    registry = Registry()
    own = [(entry.kind, entry.name) for entry in registry.entries() if entry.distribution == "acme 0.1.0"]
    assert own == [("views", "z"), ("hooks", "a"), ("hooks", "b")]
    assert {entry.kind for entry in registry.entries("hooks")} == {"hooks"}
    assert {"a", "b"} <= set(registry.names("hooks"))
    assert registry.names("hooks") == sorted(registry.names("hooks"))


def test_other_groups_are_not_ours(install: Install) -> None:
    install(
        "acme",
        {
            "vtp_plugins.spells": {"x": "acme:X"},
            "vtp_pluginz.hooks": {"y": "acme:Y"},
            "hooks": {"z": "acme:Z"},
        },
    )
    assert not [entry for entry in Registry().entries() if entry.distribution.startswith("acme ")]


def test_core_comes_through_the_same_groups() -> None:
    assert (registry := Registry()).find("encoders", "vit").distribution.startswith("vtp-plugins ")
    assert {entry.kind for entry in registry.entries()} <= set(KINDS)


# ---- finding


def test_a_name_leads_to_its_class(install: Install) -> None:
    install(
        "acme", {"vtp_plugins.modules": {"deep": "acme:Outer.Inner"}}, "class Outer:\n    class Inner: ..."
    )
    assert Registry().load("modules", "deep").__qualname__ == "Outer.Inner"


@pytest.mark.parametrize(
    ("kind", "name", "near"),
    [
        ("objectives", "dion", "dino"),
        ("objectives", "Clip", "clip"),
        ("encoders", "vitt", "vit"),
        ("views", "crop", "crops"),
    ],
)
def test_a_misspelt_name_meets_the_right_one(kind: str, name: str, near: str) -> None:
    with pytest.raises(StackFault, match=f"^here: .*{name}.*; did you mean '{near}'"):
        Registry().find(kind, name, "here")


def test_where_nothing_is_near_the_known_names_are_told() -> None:
    with pytest.raises(StackFault, match=r"no decoders 'xyz' is installed; known: .*vit_pixels"):
        Registry().find("decoders", "xyz")


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "os:system",
        "acme:A",
        "../x",
        "__class__",
        "A",
        "",
        "a" * 65,
        "a b",
        "a\n",
        None,
        3,
        {"use": "x"},
    ],
)
def test_a_name_is_never_an_import_path(install: Install, name: object) -> None:
    install("acme", {"vtp_plugins.hooks": {"a": "acme:A"}}, "raise SystemExit('imported')")
    before = set(sys.modules)
    with pytest.raises(StackFault):
        Registry().load("hooks", name)  # type: ignore[arg-type]
    assert set(sys.modules) == before


def test_two_distributions_with_one_name_are_named_both(install: Install) -> None:
    install("acme-one", {"vtp_plugins.hooks": {"twice": "acme_one:A", "alone": "acme_one:A"}}, "A = 1")
    install("acme-two", {"vtp_plugins.hooks": {"twice": "acme_two:A"}}, "A = 2", version="2.0")
    registry = Registry()
    with pytest.raises(PluginFault, match=r"hooks 'twice' comes from both .*; uninstall one") as fault:
        registry.find("hooks", "twice")
    assert "acme-one 0.1.0" in str(fault.value)
    assert "acme-two 2.0" in str(fault.value)
    assert registry.load("hooks", "alone") == 1
    assert [entry.name for entry in registry.entries("hooks")].count("twice") == 2


def test_one_name_in_two_kinds_is_fine(install: Install) -> None:
    install("acme-one", {"vtp_plugins.probes": {"linear": "acme_one:A"}}, "A = 1")
    assert Registry().find("bottlenecks", "linear").distribution.startswith("vtp-plugins")


def test_a_distribution_that_is_met_twice_counts_once(install: Install) -> None:
    install("acme-one", {"vtp_plugins.hooks": {"met": "acme_one:A"}}, "A = 1")
    install("Acme_One", {"vtp_plugins.hooks": {"met": "Acme_One:A"}}, "A = 2", version="0.2.0")
    assert Registry().load("hooks", "met") in {1, 2}  # whichever folder is met first


# ---- plugins at fault


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import no_such_library", "ModuleNotFoundError: No module named 'no_such_library'"),
        ("raise SystemExit('no licence')", "SystemExit: no licence"),
        ("1 / 0", "ZeroDivisionError"),
        ("def broken(:", "SyntaxError"),
        ("", "AttributeError: .*'A'"),
    ],
)
def test_an_import_that_fails_names_its_distribution_and_breaks_nobody_else(
    install: Install, source: str, words: str
) -> None:
    install("acme-bad", {"vtp_plugins.hooks": {"bad": "acme_bad:A"}}, source)
    install("acme-good", {"vtp_plugins.hooks": {"good": "acme_good:A"}}, "A = 1")
    registry = Registry()
    with pytest.raises(PluginFault, match=words) as fault:
        registry.load("hooks", "bad")
    assert "hooks 'bad' of acme-bad 0.1.0 fails to import" in str(fault.value)
    assert "uninstall acme-bad" in str(fault.value)
    assert registry.load("hooks", "good") == 1
    assert fault.value.code == 3


def test_an_interrupt_during_an_import_is_no_fault_of_the_plugin(install: Install) -> None:
    install("acme", {"vtp_plugins.hooks": {"slow": "acme:A"}}, "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        Registry().load("hooks", "slow")


@pytest.mark.parametrize("metadata", [None, "", "Metadata-Version: 2.1\n"])
def test_what_is_left_of_a_distribution_breaks_nobody(
    install: Install, tmp_path: Path, metadata: str | None
) -> None:
    install("acme-good", {"vtp_plugins.hooks": {"good": "acme_good:A"}}, "A = 1")
    info = tmp_path / "installed" / "left-1.0.dist-info"
    info.mkdir()
    (info / "entry_points.txt").write_bytes(b"[vtp_plugins.hooks]\nleft = left:A\n")
    if metadata is not None:
        (info / "METADATA").write_text(metadata)
    assert "left" not in Registry().names("hooks")
    assert "good" in Registry().names("hooks")


def test_entry_points_that_cannot_be_read_break_nobody(install: Install, tmp_path: Path) -> None:
    install("acme-bad", {"vtp_plugins.hooks": {"bad": "acme_bad:A"}})
    (tmp_path / "installed" / "acme_bad-0.1.0.dist-info" / "entry_points.txt").write_bytes(b"\xff\xfe[x]\n")
    assert "bad" not in Registry().names("hooks")
    assert "vit" in Registry().names("encoders")


# ---- single-file plugins

MINE = "class Mine:\n    which = {which}\nPLUGINS = {{'objectives': {{'mine': Mine}}}}\n"


def test_a_file_brings_its_classes(write: Write) -> None:
    path = write("my-loss.py", MINE.format(which=1))
    registry = Registry([path])
    assert registry.files == (path,)
    entry = registry.find("objectives", "mine")
    assert entry.distribution == f"{path} (file)"
    cls = registry.load("objectives", "mine")
    assert cls.which == 1
    assert sys.modules[cls.__module__].Mine is cls


def test_two_files_of_one_name_stay_apart(write: Write) -> None:
    one, two = (
        write("a/mine.py", MINE.format(which=1)),
        write("b/mine.py", MINE.format(which=2).replace("'mine'", "'other'")),
    )
    registry = Registry([one, two])
    assert registry.load("objectives", "mine").which == 1
    assert registry.load("objectives", "other").which == 2


def test_a_file_may_offer_classes_that_it_did_not_write(write: Write) -> None:
    local = "def make():\n    class Local: ...\n    return Local\n"
    plugins = "PLUGINS = {'hooks': {'far': collections.Counter, 'local': make()}}\n"
    source = f"import collections\n{local}{plugins}"
    registry = Registry([write("mine.py", source)])
    assert registry.load("hooks", "far").__name__ == "Counter"
    assert registry.load("hooks", "local").__name__ == "Local"


def test_a_file_cannot_quietly_replace_what_is_installed(write: Write) -> None:
    registry = Registry([write("mine.py", MINE.format(which=1).replace("'mine'", "'koleo'"))])
    with pytest.raises(PluginFault, match=r"comes from both vtp-koleo .*mine\.py \(file\)"):
        registry.find("objectives", "koleo")


@pytest.mark.parametrize(
    ("name", "source", "words"),
    [
        ("mine.py", "x = 1", "write PLUGINS = "),
        ("mine.py", "PLUGINS = [1]", "write PLUGINS = "),
        ("mine.py", "PLUGINS = {'objectives': [1]}", "write PLUGINS = "),
        ("mine.py", "PLUGINS = {'objektives': {}}", "unknown kind 'objektives'; did you mean 'objectives'"),
        ("mine.py", "raise RuntimeError('half-written')", "fails to import: RuntimeError: half-written"),
        ("mine.py", "def broken(:", "fails to import: SyntaxError"),
        ("mine.txt", "PLUGINS = {}", r"no \.py file"),
    ],
)
def test_a_file_that_is_no_plugin_is_told(write: Write, name: str, source: str, words: str) -> None:
    path = write(name, source)
    with pytest.raises(PluginFault, match=words) as fault:
        Registry([path])
    assert str(path) in str(fault.value)


def test_a_file_that_fails_leaves_no_module_behind(write: Write) -> None:
    before = set(sys.modules)
    with pytest.raises(PluginFault):
        Registry([write("mine.py", "raise RuntimeError('half-written')")])
    assert set(sys.modules) == before


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.py", tmp_path):
        with pytest.raises(PluginFault, match="no such file"):
            Registry([path])

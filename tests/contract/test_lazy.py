"""Importing the contract or the engine imports nothing heavy; every public name is there when asked for."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

PACKAGES = pytest.mark.parametrize("package", ["vtp_plugins", "vtp_core"])
HEAVY = {"torch", "torchvision", "timm", "numpy", "PIL", "open_clip", "lpips", "webdataset", "matplotlib"}


@PACKAGES
def test_importing_a_package_does_nothing(package: str) -> None:
    code = (
        "import logging, os, sys, warnings\n"
        "before = dict(os.environ), list(logging.root.handlers), list(warnings.filters)\n"
        f"import {package}, vtp_plugins.registry, vtp_plugins.errors, vtp_plugins.needs, vtp_plugins.spec\n"
        f"found = {HEAVY!r} & set(sys.modules)\n"
        "assert not found, found\n"
        "assert before == (dict(os.environ), list(logging.root.handlers), list(warnings.filters))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@PACKAGES
def test_every_public_name_resolves(package: str) -> None:
    module = importlib.import_module(package)
    names = sorted(module._HOME)
    assert getattr(module, "__all__", names) == names
    for name in names:
        assert getattr(module, name).__doc__, name


@PACKAGES
def test_another_name_is_told(package: str) -> None:
    module = importlib.import_module(package)
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'Nothing'"):
        _ = module.Nothing
    assert not hasattr(module, "nothing")


def test_the_contract_imports_neither_core_nor_plugins() -> None:
    code = (
        "import pkgutil, importlib, sys, vtp_plugins\n"
        "names = [m.name for m in pkgutil.iter_modules(vtp_plugins.__path__)]\n"
        "for name in set(names) - {'testing', 'fakes'}: importlib.import_module(f'vtp_plugins.{name}')\n"
        "ours = [m for m in sys.modules if m.startswith('vtp_') and m.partition('.')[0] != 'vtp_plugins']\n"
        "assert not ours, ours\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_faults_have_the_documented_exit_codes() -> None:
    from vtp_plugins import errors

    kinds = ("StackFault", "PluginFault", "DataFault", "NonFinite", "MemoryFault", "StorageFault")
    assert [getattr(errors, kind).code for kind in kinds] == [2, 3, 4, 5, 6, 7]
    assert issubclass(errors.StackFault, ValueError)
    assert importlib.import_module("vtp_core.errors").StackFault is errors.StackFault


def test_suggestions() -> None:
    from vtp_plugins.errors import suggestion

    assert suggestion("wieght", ["weight", "rows"]) == "; did you mean 'weight'?"
    assert suggestion("zzz", ["b", "a"]) == "; known: a, b"
    assert suggestion("zzz", []) == ""

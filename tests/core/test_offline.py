"""With ``VTP_OFFLINE=1`` nothing opens the network; an audit hook of the interpreter watches every socket."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# Whatever the standard library does with a network passes one of these events, in C as well as in Python.
WATCHED = """
import sys

opened = []
NETWORK = {"socket.__new__", "socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto",
           "urllib.Request", "http.client.connect", "ftplib.connect"}


def watch(event, arguments):
    if event in NETWORK:
        opened.append((event, arguments))
        raise RuntimeError(f"the network was opened: {event} {arguments}")


sys.addaudithook(watch)
"""
PROOF = """
import socket

try:
    socket.create_connection(("127.0.0.1", 9))
except RuntimeError:
    pass
assert opened.pop()[0] in NETWORK  # the hook sees
"""


def watched(code: str, home: Path, **environment: str) -> str:
    """Run code in a process of its own, which fails if it opens the network; returns what it printed."""
    clean = {k: v for k, v in os.environ.items() if k not in {"VTP_OFFLINE", "HF_HUB_OFFLINE"}}
    done = subprocess.run(
        [sys.executable, "-c", f"{WATCHED}{PROOF}{code}\nassert not opened, opened"], text=True,
        capture_output=True, env={**clean, "VTP_HOME": str(home), "HF_HOME": str(home / "hf"), **environment},
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


REGISTRY = """
from vtp_core.cli import main

MAE, CLIP = "vit_base_patch16_224.mae", "ViT-B-16.laion2b_s34b_b88k"
TRIED = ("list", "list --json", "verify", f"path {MAE}", "import lite0", f"import {MAE} resnet18", f"import {CLIP}")
for line in TRIED:
    try:
        main(["weights", *line.split()])
    except SystemExit as done:
        print(line, done.code)
"""
MODELS = """
import torch
from vtp_core.errors import DataFault
from vtp_core.nn.perceptual import Perceptual
from vtp_core.nn.text import build_tower, tokenizer
from vtp_core.teachers.open_clip import OpenCLIP
from vtp_core.teachers.timm import Timm
from vtp_plugins.spec import Spec

SPEC = Spec(size=(32, 32), patch=(8, 8), width=32, channels=8)
Timm(SPEC, name="test_vit", weights="random", allow_random=True)
with torch.device("meta"):
    Timm(SPEC, name="vit_base_patch16_dinov3.lvd1689m")
    OpenCLIP(SPEC, name="ViT-B-16.laion2b_s34b_b88k")
    OpenCLIP(SPEC, name="ViT-B-16-SigLIP2-256.webli")
    build_tower(32, 1, 2, 8, 32, 49408)
tokenizer()("a red circle")
Perceptual("alex", "random")
for build in (lambda: Timm(SPEC, name="test_vit"), lambda: OpenCLIP(SPEC, name="ViT-B-32.laion2b_s34b_b79k")):
    try:
        build()
    except DataFault as missing:
        print(str(missing).splitlines()[-1].strip())
"""
HUB = """
from vtp_core import Tokenizer
from vtp_core.errors import DataFault

try:
    Tokenizer.from_pretrained("someone/some-model")
except DataFault as refused:
    print(refused)
"""


def test_the_registry_towers_and_losses_open_nothing_even_where_it_is_allowed(tmp_path: Path) -> None:
    forbidden = "import os\nos.environ['VTP_OFFLINE'] = '1'\n"
    told = watched(REGISTRY + MODELS + forbidden + HUB, tmp_path)
    assert "import vit_base_patch16_224.mae resnet18 4" in told and "verify 0" in told
    assert told.splitlines()[-4:-2] == [
        "vtp weights import test_vit.r160_in1k --from FILE",
        "vtp weights import ViT-B-32.laion2b_s34b_b79k --from FILE",
    ]
    check_refusal(told, "VTP_OFFLINE")


def test_the_variable_of_the_hub_forbids_too(tmp_path: Path) -> None:
    check_refusal(watched(HUB, tmp_path, HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE")


def check_refusal(told: str, name: str) -> None:
    """An id on the hub was refused with what to do."""
    assert f"the network is forbidden ({name})" in told
    assert "hf download someone/some-model" in told

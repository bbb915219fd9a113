"""A run shows where it is: one steady picture on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
from typing import Any

import pytest
from rich.console import Console

from vtp_core.run.progress import Progress

ROW: dict[str, Any] = {
    "loss": 2.3114, "clip/contrast": 1.2, "dino/cross": 3.05, "dino/spread": 0.05, "koleo/spread": 1.25e-5,
    "weight/clip": 1.0, "weight/dino": 1.0, "weight/koleo": 0.1, "lr/encoder": 1e-3, "grad/encoder": 0.7,
    "time/step": 0.1, "time/data": 0.003, "images_per_second": 231.4, "memory/peak": 5e9,
}  # fmt: skip


class Clock:
    """A clock that the test turns."""

    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


def plain(steps: int, start: int = 0, row: dict[str, float] | None = None) -> list[str]:
    file, clock = io.StringIO(), Clock()
    with Progress(steps, start, Console(file=file), now=clock) as progress:
        for step in range(start + 1, steps + 1):
            clock.time += 1.0
            progress.update(step, {**ROW, **(row or {})})
    return file.getvalue().splitlines()


def test_a_pipe_gets_a_plain_line_every_ten_seconds_and_the_first_and_last_step() -> None:
    lines = plain(25)
    assert [line.split()[1] for line in lines] == ["1/25", "11/25", "21/25", "25/25"]
    assert lines[1] == (
        "step 11/25 | loss 2.31 | clip 1.20 dino 3.10 koleo 1.25e-05 | 231 images/s | data 3 % | 0:00:14 left"
    )
    assert lines[-1].endswith("0:00:25 in all")


def test_a_resumed_run_counts_on_and_its_speed_is_its_own() -> None:
    lines = plain(1000, start=990)
    assert lines[0].startswith("step 991/1000 ") and lines[0].endswith("0:00:09 left")


def test_numbers_that_are_not_finite_are_shown() -> None:
    assert "loss nan" in plain(1, row={"loss": float("nan")})[0]
    assert "clip -inf" in plain(1, row={"clip/contrast": float("-inf")})[0]


def test_a_row_may_lack_anything() -> None:
    file = io.StringIO()
    Progress(5, console=Console(file=file)).update(1, {"step": 1})
    assert re.fullmatch(r"step 1/5 \| 0:00:0\d left\n", file.getvalue())


def test_colours_forced_upon_a_pipe_bring_no_control_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    file = io.StringIO()
    with Progress(2, console=Console(file=file)) as progress:
        progress.note("checkpoints/step-00000001 [bold] written")
        progress.update(1, ROW)
    assert "\x1b" not in file.getvalue()
    assert file.getvalue().startswith("checkpoints/step-00000001 [bold] written\n")


@pytest.mark.parametrize("width", [20, 50, 80, 200])
def test_the_picture_fits_any_width_in_two_lines(width: int) -> None:
    file, clock = io.StringIO(), Clock()
    console = Console(file=file, force_terminal=True, width=width, color_system=None)
    progress = Progress(1500, 0, console, live=True, now=clock)
    clock.time += 30
    progress.update(
        250, {**ROW, **{f"weight/extra{i}": 1 for i in range(9)}, **{f"extra{i}/x": 1 for i in range(9)}}
    )
    progress.close()
    with console.capture() as capture:
        console.print(progress._picture())
    lines = capture.get().splitlines()
    assert len(lines) == 2
    assert all(len(line) < width for line in lines)
    assert lines[0].startswith(" 250/1500 ━")
    assert ("0:02:30 left" in lines[0]) == (width > 40)


def test_a_lost_terminal_does_not_end_a_run() -> None:
    class Lost(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    for live in (False, True):
        progress = Progress(2, console=Console(file=Lost(), force_terminal=live), live=live)
        progress.update(1, ROW)
        progress.note("x")
        progress.update(2, ROW)
        progress.close()


TERMINAL = """
import os, sys, time
from vtp_core.run.progress import Progress
with Progress(6) as progress:
    for step in range(1, 7):
        time.sleep(0.03)
        progress.update(step, {"loss": 1.0 / step, "clip/x": 2.0, "weight/clip": 1.0})
        if step == 3:
            progress.note("written step-00000003")
        if step == 4:
            print("a library prints")
            if os.fork() == 0:
                print("a worker warns", file=sys.stderr, flush=True)
                os._exit(0)
            os.wait()
print("after")
"""


def test_on_a_real_terminal_notes_and_prints_stand_above_one_last_picture() -> None:
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}
    child = subprocess.Popen([sys.executable, "-c", TERMINAL], stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    output = b""
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:  # Linux says so when the last writer is gone
            break
        output += chunk
    os.close(master)
    assert child.wait() == 0
    screen = shown(output.decode())
    assert "written step-00000003" in screen and "a library prints" in screen
    assert sum("/6 " in line for line in screen) <= 2  # the worker's warning may push one picture up
    last = next(index for index, line in enumerate(screen) if line.startswith("6/6 "))
    assert screen[last + 1].split() == ["loss", "0.167", "clip", "2.00"]
    assert screen[last + 2] == "after"
    assert output.decode().rstrip().endswith("after") and "\x1b[?25h" in output.decode()  # the cursor is back


def shown(output: str) -> list[str]:
    """What a terminal shows after these bytes: the few codes that rich moves the cursor with."""
    lines, row, column = [""], 0, 0
    for match in re.finditer(r"\x1b\[(\??\d*(?:;\d+)*)([A-Za-z])|(\r)|(\n)|([^\x1b\r\n]+)", output):
        count, code, back, down, text = match.groups()
        if code == "A":
            row = max(row - int(count or 1), 0)
        elif code == "K":
            lines[row] = ""
        elif back:
            column = 0
        elif down:
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif text:
            lines[row] = lines[row][:column].ljust(column) + text + lines[row][column + len(text) :]
            column += len(text)
    return [line.rstrip() for line in lines]

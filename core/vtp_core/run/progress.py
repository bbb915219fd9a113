"""How far a run is: a live bar on a terminal, one plain line per 10 s elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import Console, Group
from rich.file_proxy import FileProxy
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_WIDEST = 100  # columns: a line that reaches the edge wraps when the window shrinks
_BAR = 8  # columns that the bar keeps to itself
_REFRESH = 0.1  # seconds between two pictures
_WINDOW = 256  # updates that the speed is averaged over


class Progress:
    """Shows the steps of a run as they end.

    There is no thread: pictures are drawn by :meth:`update`, so that loader workers fork safely.

    Args:
        steps: of the whole run.
        start: steps already taken when this process began.
        console: where to show; standard error by default.
        every: seconds between two plain lines.
        live: draw a bar; by default on a terminal that can.
        now: clock in seconds.
    """

    def __init__(
        self,
        steps: int,
        start: int = 0,
        console: Console | None = None,
        *,
        every: float = 10.0,
        live: bool | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.steps = steps
        self.step = start
        self._console = console or Console(stderr=True)
        self._every = every
        self._now = now
        self._began = now()
        self._marks = deque([(self._began, start)], maxlen=_WINDOW)
        self._rows: deque[Mapping[str, Any]] = deque(maxlen=_WINDOW)
        self._shown = -float("inf")
        self._live: Live | None = None
        if _can_draw(self._console) if live is None else live:
            self._live = Live(
                console=self._console,
                auto_refresh=False,
                get_renderable=self._picture,
                redirect_stdout=sys.stdout.isatty(),  # what goes into a pipe must not end up on the terminal
            )
            os.register_at_fork(after_in_child=_undo_redirection)
            with _despite_a_lost_terminal():
                self._live.start(refresh=True)

    def update(self, step: int, row: Mapping[str, Any]) -> None:
        """Show that ``step`` steps are taken, the last with this row of ``metrics.jsonl``."""
        now = self._now()
        self.step = step
        self._marks.append((now, step))
        self._rows.append(row)
        wait = self._every if self._live is None else _REFRESH
        if now - self._shown >= wait or step >= self.steps:
            self._shown = now
            self._show()

    def note(self, text: str) -> None:
        """Print a line that stays, above the bar."""
        with _despite_a_lost_terminal():
            if self._live is None:
                self._line(text)
            else:
                self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the last picture on the screen and hand the terminal back."""
        if self._live is not None:
            with _despite_a_lost_terminal():
                self._live.stop()
            self._live = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _show(self) -> None:
        with _despite_a_lost_terminal():
            if self._live is not None:
                self._live.refresh()
            else:
                losses = [f"{name} {value}" for name, value in self._losses()]
                losses = [part for part in (" ".join(losses[:1]), " ".join(losses[1:])) if part]
                self._line(" | ".join([f"step {self.step}/{self.steps}", *losses, *self._speeds()]))

    def _line(self, text: str) -> None:
        self._console.file.write(text + "\n")
        self._console.file.flush()

    def _picture(self) -> Group:
        """Two lines that never wrap: the bar with as many speeds as fit, and the losses."""
        width = max(min(self._console.width - 1, _WIDEST), 1)
        steps = f"{self.step:>{len(str(self.steps))}}/{self.steps}"
        speeds = self._speeds()
        while speeds and len(steps) + len("  ".join(speeds)) + _BAR + 2 > width:
            speeds.pop(0)
        bar = Table.grid(padding=(0, 1), pad_edge=False)
        bar.width = width
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True, overflow="ellipsis", justify="right")
        bar.add_row(
            Text(steps, style="bold"),
            ProgressBar(total=max(self.steps, 1), completed=self.step),
            Text("  ".join(speeds), style="dim"),
        )
        losses = Text(no_wrap=True, overflow="ellipsis")
        for name, value in self._losses():
            losses.append(f"{name} ", style="dim").append(f"{value}  ")
        losses.truncate(width, overflow="ellipsis")
        return Group(bar, losses)

    def _losses(self) -> list[tuple[str, str]]:
        """The loss, and the sum of each objective's terms, as text; of the newest row."""
        row = self._rows[-1] if self._rows else {}
        objectives = {key.removeprefix("weight/") for key in row if key.startswith("weight/")}
        sums = {"loss": float(row["loss"])} if "loss" in row else {}
        for key, value in row.items():
            name = key.partition("/")[0]
            if name != key and name in objectives:
                sums[name] = sums.get(name, 0.0) + float(value)
        return [(name, _number(value)) for name, value in sums.items()]

    def _speeds(self) -> list[str]:
        """Images a second, share of the time spent waiting for data, time left or taken."""
        parts = []
        spans = [(row["time/step"], row.get("time/data", 0.0)) for row in self._rows if "time/step" in row]
        seconds = sum(step for step, _ in spans)
        rates = [row["images_per_second"] for row in self._rows if row.get("images_per_second")]
        if rates:
            parts.append(f"{len(rates) / sum(1 / rate for rate in rates):,.0f} images/s")
        if seconds > 0:
            parts.append(f"data {sum(data for _, data in spans) / seconds:.0%}".replace("%", " %"))
        (since, first), (until, last) = self._marks[0], self._marks[-1]
        if self.step >= self.steps:
            parts.append(f"{_duration(until - self._began)} in all")
        elif last > first:
            parts.append(f"{_duration((until - since) / (last - first) * (self.steps - last))} left")
        return parts


def _can_draw(console: Console) -> bool:
    """A terminal that moves its cursor; colours forced upon a pipe do not make it one."""
    return console.file.isatty() and not console.is_dumb_terminal and not console.is_jupyter


def _undo_redirection() -> None:
    """A loader worker that warns must not draw the bar of its parent."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, FileProxy):
            setattr(sys, name, stream.rich_proxied_file)


@contextlib.contextmanager
def _despite_a_lost_terminal() -> Iterator[None]:
    """A closed window or a dead pager must not end a run."""
    with contextlib.suppress(OSError, ValueError):
        yield


def _number(value: float) -> str:
    """Three significant digits, of steady width."""
    if value != value or abs(value) == float("inf"):
        return str(value)
    return f"{value:#.3g}".removesuffix(".")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"

"""The page of a run: ``report.html`` beside its metrics, readable offline, without scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from vtp_plugins.hookspecs import hookimpl
from vtp_plugins.registry import Registry
from vtp_plugins.spec import Spec
from vtp_report.amounts import Amounts

__all__ = ["Report"]


class Report:
    """Writes ``report.html`` when a run is complete; what is missing leaves one line in its section.

    Args:
        spec: not read; a report describes a directory.
        samples: pictures in each row of reconstructions and of components; half as many close-ups.
        questions: questions asked of the neighbours, and in each direction of zero-shot.
        depth: answers shown for each question.
        seed: decides which samples are shown, and the noise that a generator begins at.
        labels: whose samples a generator's page shows: names, numbers or captions; or how many of them, the
            most frequent. The strip between two labels takes the first two.
        draws: samples of each, and as many guided ones from the same noise.
        frames: pictures in an interpolation strip, ends included.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        samples: Annotated[int, Field(ge=1, le=32)] = 8,
        questions: Annotated[int, Field(ge=1, le=32)] = 8,
        depth: Annotated[int, Field(ge=1, le=10)] = 5,
        seed: int = 0,
        labels: Annotated[int, Field(ge=1, le=24)] | tuple[str | int, ...] = 6,
        draws: Annotated[int, Field(ge=2, le=8)] = 2,
        frames: Annotated[int, Field(ge=3, le=16)] = 7,
    ) -> None:
        self.amounts = Amounts(samples, questions, depth, seed, labels, draws, frames)

    @hookimpl
    def vtp_finish(self, run: Path, registry: Registry) -> Path:
        """Write the page of ``run`` and return its path."""
        from vtp_core.run.files import replace
        from vtp_report.page import render
        from vtp_report.record import read
        from vtp_report.sections import sections

        parts = sections(read(run, registry), self.amounts)
        page = run / "report.html"
        replace(page, render(**parts).encode())
        return page

"""The page of a run: ``report.html`` beside its metrics, readable offline, without scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from vtp_plugins.hookspecs import hookimpl
from vtp_plugins.spec import Spec

__all__ = ["Report"]


class Report:
    """Writes ``report.html`` when a run is complete; what is missing leaves one line in its section.

    Args:
        spec: not read; a report describes a directory.
        samples: pictures in each row of reconstructions and of components.
        questions: questions asked of the neighbours, and in each direction of zero-shot.
        depth: answers shown for each question.
        seed: decides which samples are shown.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        samples: Annotated[int, Field(ge=1, le=32)] = 8,
        questions: Annotated[int, Field(ge=1, le=32)] = 8,
        depth: Annotated[int, Field(ge=1, le=10)] = 5,
        seed: int = 0,
    ) -> None:
        self.samples, self.questions, self.depth, self.seed = samples, questions, depth, seed

    @hookimpl
    def vtp_finish(self, run: Path) -> Path:
        """Write the page of ``run`` and return its path."""
        from vtp_core.run.files import replace
        from vtp_report.page import render
        from vtp_report.record import read
        from vtp_report.sections import sections

        parts = sections(
            read(run), samples=self.samples, questions=self.questions, depth=self.depth, seed=self.seed
        )
        page = run / "report.html"
        replace(page, render(**parts).encode())
        return page

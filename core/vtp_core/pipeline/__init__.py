"""Pipelines: stages in order, each with an artefact that has a content hash; a finished stage is not run again."""

from __future__ import annotations

from pathlib import Path

FILE = "pipeline.yaml"
"""A directory that holds it is a pipeline's: the resolved pipeline, which ``vtp resume`` continues."""


def is_pipeline(path: Path) -> bool:
    """Whether a directory is a pipeline's, and not a run's."""
    return (path / FILE).is_file()

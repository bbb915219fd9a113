"""The two kinds of stage: a stack that is trained, and latents that are written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vtp_core.errors import DataFault
from vtp_core.pipeline import artefacts
from vtp_core.run.directory import RunDirectory
from vtp_core.run.environment import masked
from vtp_core.stack import Stack

if TYPE_CHECKING:
    from vtp_plugins.protocols import Dataset

PLACES = {"tokenizer": "from", "data": "path"}
"""Role -> key of the stack that holds the directory."""
_FOLLOWS = "exports"  # of ``tokenizer``: filled in from the earlier run, and narrowed to what is installed
Places = Mapping[str, Path]
"""Directory of each stage that is done, by its name."""


class Stage(Protocol):
    """What the pipeline asks of a stage.

    Attributes:
        name: of the stage.
        title: of what it does, for its header line.
        reads: role -> stage that it reads.
    """

    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def reads(self) -> Mapping[str, str]: ...

    def written(self) -> dict[str, Any]:
        """The stage as ``pipeline.yaml`` holds it."""
        ...

    def identity(self) -> Any:
        """What decides the artefact besides what it reads."""
        ...

    def outside(self) -> dict[str, str]:
        """Hashes of what decides it that is neither in the stack nor made by a stage: by role, or by plugin."""
        ...

    def fingerprint(self, places: Places) -> str | None:
        """Of the dataset that it reads itself."""
        ...

    def check(self, stages: Mapping[str, Stage]) -> None:
        """Everything that can be checked before an earlier stage has run."""
        ...

    def promised(self, stages: Mapping[str, Stage]) -> Dataset | None:
        """What a later stage will read as its data, as far as it is known before; None where it is not."""
        ...

    def fits(self, folder: Path) -> bool:
        """Whether what the folder holds is this stage's, and can be continued."""
        ...

    def work(self, folder: Path, places: Places, note: Callable[[str], object]) -> None:
        """Do it, or go on with it."""
        ...

    def artefact(self, folder: Path) -> str:
        """Hash of the finished artefact, every byte of which is read."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class StackStage:
    """A stack that is trained.

    Args:
        name: of the stage.
        stack: checked; where it reads another stage it points at a plan, which :meth:`placed` replaces.
        reads: role -> stage that it reads.
    """

    name: str
    stack: Stack
    reads: Mapping[str, str]

    @property
    def title(self) -> str:
        return self.stack.name

    @property
    def alone(self) -> bool:
        """Whether it is nothing but a stack, so that ``vtp train`` may have made its artefact."""
        return not self.reads and not self.outside()

    def _tree(self) -> dict[str, Any]:
        """The stack without places of directories, and without what follows from the earlier run."""
        tree = {key: node for key, node in self.stack.config.items() if key != "run"}
        for role, key in PLACES.items():
            if isinstance(tree.get(role), dict):
                gone = {key if role in self.reads else "", _FOLLOWS if role == "tokenizer" else ""}
                tree[role] = {k: v for k, v in tree[role].items() if k not in gone}
        return {key: node for key, node in tree.items() if node != {} or key != "tokenizer"}

    def written(self) -> dict[str, Any]:
        return {"name": self.stack.name, "stack": masked(self._tree()), **self.reads}

    def identity(self) -> Any:
        return masked(self._tree())

    def outside(self) -> dict[str, str]:
        source = (self.stack.config.get("tokenizer") or {}).get("from")
        found = artefacts.run_hash(Path(source)) if source and "tokenizer" not in self.reads else None
        code = artefacts.code_of(self._tree(), self.stack.registry)
        return code if found is None else {**code, "tokenizer": found}

    def placed(self, places: Places, folder: Path | None = None) -> Stack:
        """The stack with the directories of what it reads, and its own."""
        config = dict(self.stack.config)
        for role, target in self.reads.items():
            config[role] = {**config[role], PLACES[role]: str(places[target])}
        if folder is not None:
            config["run"] = {"dir": str(folder)}
        return dataclasses.replace(self.stack, config=config)

    def fingerprint(self, places: Places) -> str | None:
        from vtp_core.build import blueprint, spec_of
        from vtp_core.evaluation import dataset_factory

        if "data" in self.reads:
            return None
        stack = self.placed(places)
        return dataset_factory(stack, spec_of(blueprint(stack)))(None).fingerprint()

    def check(self, stages: Mapping[str, Stage]) -> None:
        from vtp_core.build import blueprint
        from vtp_core.describe import plan
        from vtp_core.evaluation import dataset_component, probe_components

        dataset_component(self.stack)
        probe_components(self.stack)
        promised = stages[self.reads["data"]].promised(stages) if "data" in self.reads else None
        if "data" in self.reads and promised is None:
            blueprint(self.stack)
        else:
            plan(self.stack, dataset=promised)

    def promised(self, stages: Mapping[str, Stage]) -> Dataset | None:
        return None

    def fits(self, folder: Path) -> bool:
        from vtp_core.run import checkpoint

        if not (folder / "run.json").is_file():
            return True  # killed while it was made
        run = RunDirectory(folder)
        begun = any((folder / "checkpoints").glob("step-*")) or run.finished
        return self.made(run) and (not begun or checkpoint.latest(folder / "checkpoints") is not None)

    def made(self, run: RunDirectory) -> bool:
        """Whether a run is one of this stage's stack, which nobody has changed since."""
        mine = StackStage(self.name, dataclasses.replace(self.stack, config=run.stack()), self.reads)
        return not run.changed and artefacts.digest(mine.identity()) == artefacts.digest(self.identity())

    def work(self, folder: Path, places: Places, note: Callable[[str], object]) -> None:
        from vtp_core.adopting import settled
        from vtp_core.training import Training

        resume = folder if (folder / "run.json").is_file() else None
        Training(settled(self.placed(places, folder)), resume).run()

    def artefact(self, folder: Path) -> str:
        run = RunDirectory(folder)
        if not run.finished:
            raise DataFault(f"{folder} is not finished")
        if not self.made(run):
            raise DataFault(f"{folder / 'stack.yaml'} was changed since")
        return artefacts.run_artefact(folder)

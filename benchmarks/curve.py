"""Probes of demo runs against training time, beside what was asked for: ``python -m benchmarks.curve RUN... ``.

Writes ``docs/demo.png``. Time is the sum of the steps' own times, without evaluation.
"""

from __future__ import annotations

import sys
from itertools import accumulate
from pathlib import Path

from vtp_core.run.directory import RunDirectory
from vtp_core.run.metrics import read

PANELS = [  # label, probe, split, asked for
    ("PSNR, trained images, dB", "reconstruction/psnr", "train", 22.5),
    ("text to image, top-1", "zero_shot/text_to_image_top1", "unseen_style", 0.15),
    ("1-NN on CLS, same emoji", "knn/cls/concept@google", "unseen_style", 0.26),
    ("1-NN on CLS, sub-category", "knn/cls/label@google", "unseen_style", 0.38),
]


def main() -> None:
    """Draw every run given on the command line."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(PANELS), figsize=(14, 3.4), layout="constrained")
    for path in map(Path, sys.argv[1:]):
        run = RunDirectory.open(path)
        minutes = dict(enumerate(accumulate(row["time/step"] / 60 for row in read(run.metrics)), start=1))
        threads = run.environment()["torch"]["threads"]
        label = f"{run.stack()['train']['steps']} steps, {threads} thread{'s'[: threads > 1]}"
        for axis, (_, probe, split, _) in zip(axes, PANELS, strict=True):
            rows = [row for row in read(run.probes) if (row["probe"], row["split"]) == (probe, split)]
            axis.plot(
                [minutes[row["step"]] for row in rows], [row["value"] for row in rows], "o-", label=label
            )
    for axis, (title, _, _, asked) in zip(axes, PANELS, strict=True):
        axis.axhline(asked, color="grey", linestyle="--", linewidth=1)
        axis.set(title=title, xlabel="minutes of training")
    axes[0].legend(fontsize=8)
    figure.savefig(Path(__file__).parent.parent / "docs" / "demo.png", dpi=80)


if __name__ == "__main__":
    main()

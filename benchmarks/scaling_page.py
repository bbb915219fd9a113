"""The section and the picture that ``scaling.py`` writes from its rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import tables
from benchmarks.cluster import Cluster

PARTS = {
    "compute": "products", "update": "update", "gradients": "gradients", "losses": "losses", "shards": "shards",
}  # fmt: skip
BUSY = 0.5  # load of a machine that does something else
COLOURS = ("#1f6fb4", "#c8501e")
Row = dict[str, Any]


def fits(row: Row) -> bool:
    """Whether a step has room on the cluster's GPUs."""
    return Cluster().fits(row["bytes"])


def efficiency(row: Row, rows: Sequence[Row]) -> float:
    """Images a second and GPU, over those of the fewest GPUs of the same kind that have room for it."""
    same = [r for r in rows if fits(r) and all(r[k] == row[k] for k in ("scaling", "stack", "parallel"))]
    first = min(same, key=lambda r: r["gpus"])
    return float((row["rows"] / row["seconds"]) / (first["rows"] / first["seconds"]))


def titles(rows: Sequence[Row]) -> dict[str, str]:
    """Kind of scaling -> what stays the same."""
    weak = next(row for row in rows if row["scaling"] == "weak")
    strong = next(row for row in rows if row["scaling"] == "strong")
    return {
        "weak": f"Weak scaling: {weak['rows']} rows a GPU",
        "strong": f"Strong scaling: {strong['batch']:,} images a step",
    }


def section(measured: Row, simulated: Sequence[Row]) -> list[str]:
    """The lines between the page's markers."""
    lines = [*_measured(measured), "", *_assumed(Cluster()), "", "![Scaling, simulated](scaling.png)", ""]
    head = ["", "GPUs", "rows a GPU", "step", *PARTS.values(), "efficiency", "memory"]
    for scaling, title in titles(simulated).items():
        chosen = [row for row in simulated if row["scaling"] == scaling]
        lines += [f"{title}.", "", *tables.table(head, [_cells(row, chosen) for row in chosen]), ""]
    return [
        *lines,
        "Efficiency is images a second and GPU, over those of the fewest GPUs of the same stack and kind that have",
        "room for their rows. Memory is the plan's, of one GPU. With `fsdp2` efficiency may pass 100%: each GPU",
        "updates only its part of the weights, where one GPU alone updates all, and that saves more than communication",
        "takes.",
    ]


def _measured(row: Row) -> list[str]:
    speed, load = row["images_per_second"], row.get("load")
    lines = [
        f"**Measured** on two cores ({row['machine']}): `{row['stack']}`, {row['rows']} rows a process, medians of "
        f"{row['rounds']} alternating rounds.",
        f"One process trains {speed['alone']:.1f} images/s, two over gloo {speed['together']:.1f}: a weak-scaling "
        f"efficiency of {row['efficiency']:.0%}.",
        "The cores share caches and the way to memory: two processes that know nothing of each other reach "
        f"{row['shared_memory']:.0%}, and of that communication and waiting leave {row['communication']:.0%}.",
    ]
    if load is None or load > BUSY:
        said = "an unknown load" if load is None else f"a load of {load:.1f}"
        lines.append(
            f"Other work kept the machine at {said} meanwhile, so these say little; measure again when it rests."
        )
    return lines


def _assumed(cluster: Cluster) -> list[str]:
    return [
        "**Simulated** from the FLOPs and bytes of the plan, in bfloat16 with blocks recomputed. Nothing of this was",
        "run. Assumed:",
        "",
        f"- H100 SXM whose products, recomputed ones too, reach {cluster.share:.0%} of {cluster.peak / 1e12:.0f} "
        "TFLOP/s;",
        f"  weights, moments and averages are read and written at {cluster.memory / 1e12:.2f} TB/s.",
        f"- One way, a GPU sends {cluster.inside / 1e9:.0f} GB/s within a machine of {cluster.machine} and "
        f"{cluster.outside / 1e9:.0f} GB/s (400 Gb/s) to other machines;",
        "  collectives go among machines first, then within each.",
        f"- Any collective takes {cluster.call * 1e6:.0f} us, and {cluster.doubling * 1e6:.0f} us more for every "
        "doubling of the GPUs.",
        "- Replicated gradients are averaged after the last backward, with nothing beside them. Sharded weights are",
        "  fetched and gradients scattered beside the products: what outlasts these is added, and the first and the",
        "  last call.",
        f"- A GPU has {cluster.capacity / 1e9:.0f} GB (sold as 80), of which a step may take {cluster.usable:.0%}; the "
        "rest is the driver's,",
        "  NCCL's and the allocator's gaps. Rows that need more do not fit: `train.accumulate` would split them.",
        "- Data is there in time.",
    ]


def _cells(row: Row, rows: Sequence[Row]) -> list[str]:
    head = [f"`{row['stack']}` {row['parallel']}", str(row["gpus"]), f"{row['rows']:,}"]
    memory = f"{row['bytes'] / 1e9:.0f} GB"
    if not fits(row):
        return [*head, "does not fit", *([""] * len(PARTS)), "", memory]
    parts = [f"{1e3 * row[part]:,.1f} ms" if row[part] else "" for part in PARTS]
    return [*head, f"{1e3 * row['seconds']:,.0f} ms", *parts, f"{efficiency(row, rows):.0%}", memory]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Efficiency by number of GPUs; curves are named at their ends."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    for panel, (scaling, title) in zip(axes, titles(rows).items(), strict=True):
        _panel(panel, [row for row in rows if row["scaling"] == scaling and fits(row)])
        panel.set(title=title, xlabel="GPUs, log2")
    axes[0].set_ylabel("throughput of a GPU, % of that with the fewest GPUs")
    figure.suptitle(
        "Simulated: H100 SXM, 8 a machine, 400 Gb/s a GPU between machines", fontsize=10, color="0.35"
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(panel: Any, rows: Sequence[Row]) -> None:
    stacks = list(dict.fromkeys(row["stack"] for row in rows))
    curves: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        curves.setdefault((row["stack"], row["parallel"]), []).append(row)
    ends = []
    for (stack, parallel), line in curves.items():
        xs, ys = [row["gpus"] for row in line], [100 * efficiency(row, rows) for row in line]
        colour = COLOURS[stacks.index(stack)]
        panel.plot(xs, ys, "-" if parallel == "replicated" else "--", color=colour, marker="o", markersize=4)
        ends.append((ys[-1], f"{stack} {parallel}", colour))
    last = max(row["gpus"] for row in rows)
    for place, (height, name, colour) in zip(
        _apart([end[0] for end in sorted(ends)]), sorted(ends), strict=True
    ):
        panel.annotate(
            name, (last, height), (last * 1.3, place), color=colour, va="center", fontsize=9,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5},
        )  # fmt: skip
    panel.axhline(100, color="0.6", linewidth=0.8)
    ticks = sorted({row["gpus"] for row in rows})
    panel.set_xscale("log", base=2)
    panel.set_xticks(ticks, [str(tick) for tick in ticks])
    panel.set(xlim=(ticks[0] / 1.2, last * (last / ticks[0]) ** 0.45), ylim=(50, 108))
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)


def _apart(heights: Sequence[float], least: float = 5.5) -> list[float]:
    """Places for labels, ascending, none nearer to the next than ``least``, around where they belong."""
    places: list[float] = []
    for height in heights:
        places.append(max(height, places[-1] + least) if places else height)
    shift = sum(place - height for place, height in zip(places, heights, strict=True)) / len(places)
    return [place - shift for place in places]

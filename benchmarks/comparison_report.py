"""Tables and plots of the scores of `compare_objectives.py`."""

import json
import statistics
from pathlib import Path

import matplotlib
import numpy as np

from vcm_jax.atomic import atomic_path
from vcm_jax.media import page

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import ScalarFormatter

STEPS = (1, 2, 4, 25)
METRICS = {
    "f1": ("onset F1", "higher is better"),
    "material": ("material recognised", "higher is better"),
    "frechet": ("log-mel Frechet distance", "lower is better"),
    "sharpness": ("spectral sharpness", "as the true sound's is best"),
}
# Of how its sounds are made: by its own sampler, or without the guidance of that.
OWN, UNGUIDED = "own sampler", "unguided"
ERROR = {"frechet_error": ("standard error of the distance", "with other clips, not other seeds")}


def spread(values) -> str:
    """The mean, and the standard deviation if there are several values."""
    text = f"{statistics.fmean(values):.3f}"
    return text + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def tables(results, truth, measured, base: str) -> list[tuple[str, list[list[str]]]]:
    """(title, rows) of every table; the first row is the header."""
    found = []
    for metric, (title, better) in (METRICS | ERROR).items():
        rows = [["", *(f"{n} step{'s' * (n > 1)}" for n in STEPS)]]
        for name, runs in results.items():
            values = [[run["metrics"][str(n)][metric] for run in runs] for n in STEPS]
            rows.append([name, *map(spread, values)])
        for name, values in truth.items():
            rows.append([name, *[f"{values[metric]:.3f}"] * len(STEPS)])
        found.append((f"{title} ({better})", rows))
    head = ["", "ms a step", f"time / {base}", "GFLOP a step", f"FLOPs / {base}"]
    rows = [[*head, "MB a device", f"memory / {base}", "steps", "seeds"]]
    for name, runs in results.items():
        if name in measured:
            m, b = measured[name], measured.get(base, measured[name])
            flops = ["", ""]
            if m["flops"] and b["flops"]:
                flops = [f"{m['flops'] / 1e9:.1f}", f"{m['flops'] / b['flops']:.2f}"]
            time = [f"{1000 * m['seconds']:.0f}", f"{m['seconds'] / b['seconds']:.2f}"]
            memory = m["temporary_bytes"]
            memory = [f"{memory / 1e6:.0f}", f"{memory / b['temporary_bytes']:.2f}"]
            steps, seeds = str(runs[0]["steps"]), str(len(runs))
            rows.append([name, *time, *flops, *memory, steps, seeds])
    found.append(("Training step", rows))
    return found


def plot(results, truth):
    """Every metric over the number of steps, one line per run, with the range over seeds."""
    figure, axes = plt.subplots(1, len(METRICS), figsize=(4.2 * len(METRICS), 3.8))
    colours = plt.get_cmap("tab10" if len(results) <= 10 else "tab20").colors
    for axis, (key, (title, better)) in zip(axes, METRICS.items()):
        for colour, (name, runs) in zip(colours, results.items()):
            values = np.array([[run["metrics"][str(n)][key] for n in STEPS] for run in runs])
            axis.plot(STEPS, values.mean(0), "o-", ms=3.5, lw=1.3, color=colour, label=name)
            axis.fill_between(STEPS, values.min(0), values.max(0), color=colour, alpha=0.15, lw=0)
        for (name, found), style in zip(truth.items(), ("-", ":")):
            if key == "frechet" and found[key] < 0.01:
                continue  # the true sound's distance to itself has no place on a log scale
            axis.axhline(found[key], color="black", lw=1, ls=style, label=name)
        axis.set_xscale("log")
        axis.set_xticks(STEPS, [str(n) for n in STEPS])
        axis.minorticks_off()
        axis.set_xlabel("sampler steps")
        axis.set_title(f"{title}\n({better})", fontsize=9)
        if key == "frechet":
            axis.set_yscale("log")
            low, high = axis.get_ylim()
            ticks = [m * 10.0**e for e in range(-2, 4) for m in (1, 2, 5)]
            axis.set_yticks([tick for tick in ticks if low <= tick <= high])
            axis.yaxis.set_major_formatter(ScalarFormatter())
            axis.minorticks_off()
    axes[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    return figure


def write_report(entries, out: Path, note: str) -> Path:
    """Writes comparison.md, comparison.png and comparison.html for the runs that have scores.

    Returns:
      Path of the page.

    Raises:
      ValueError: when no run has scores.
    """
    results = {}
    for entry in entries:
        path = entry.workdir / "scores.json"
        if path.exists():
            scores = json.loads(path.read_text())
            for way, metrics in scores["metrics"].items():
                name = entry.name if way == OWN else f"{entry.name}, {way}"
                results.setdefault(name, []).append(scores | {"metrics": metrics})
    if not results:
        raise ValueError(f"{out}: no run is scored yet")
    truth = json.loads((out / "truth.json").read_text())
    steps = out / "steps.json"
    measured = json.loads(steps.read_text()) if steps.exists() else {}
    base = "flow_matching" if "flow_matching" in results else next(iter(results))
    found = tables(results, truth, measured, base)
    title = "Objectives compared on Impacts"
    lines = [f"# {title}", "", note, ""]
    for name, rows in found:
        lines += [f"## {name}", "", "| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in rows[1:]] + [""]
    figure = plot(results, truth)
    with atomic_path(out / "comparison.png") as path:
        figure.savefig(path, format="png", dpi=90)
    lines += ["![](comparison.png)", ""]
    with atomic_path(out / "comparison.md") as path:
        path.write_text("\n".join(lines))
    page.write_document(
        out / "comparison.html",
        title,
        page.element("h1", title),
        page.element("p", note),
        page.plot(figure),
        [(page.element("h2", name), page.table(head, rows)) for name, (head, *rows) in found],
    )
    return out / "comparison.html"

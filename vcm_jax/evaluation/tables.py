"""Metrics as aligned text, beside the papers'."""

from vcm_jax.metrics.sounds import METRICS

# Columns of the papers' tables: VGGSound test (SoundVCM table 1). The IB score is times 100 there.
PAPER_METRICS = (
    "FD-VGG",
    "FD-PANN",
    "FD-PASST",
    "KL-PANNS-softmax",
    "KL-PASST-softmax",
    "ISC-PANNS-mean",
    "IB-Score",
    "DeSync",
)
PAPERS = {
    "SoundVCM, 1 step": (0.88, 5.95, 78.90, 1.78, 1.76, 12.54, 25.31, 0.632),
    "SoundVCM, 4 steps": (0.74, 5.08, 69.75, 1.66, 1.58, 13.62, 27.32, 0.553),
    "MMAudio-S-16k, 25 x 2": (0.79, 5.22, 70.19, 1.65, 1.59, 14.44, 29.13, 0.483),
}
_NOTE = (
    "The papers' rows: VGGSound test, about 15,000 clips. FD and ISC depend on the number of clips."
)


def table_of_caches(result: dict) -> str:
    """The metrics of `evaluate_caches` and the papers' values."""
    found = result["metrics"]
    rows = [["", "this", "clips", *PAPERS]]
    for name in (*PAPER_METRICS, *(name for name in found if name not in PAPER_METRICS)):
        papers = [
            f"{row[PAPER_METRICS.index(name)]:g}" if name in PAPER_METRICS else ""
            for row in PAPERS.values()
        ]
        value = found.get(name)
        scale, label = (100, "IB-Score x 100") if name == "IB-Score" else (1, name)
        shown = "-" if value is None else f"{scale * value:.4g}"
        count = str(result["clips"].get(name, "-"))
        if value is not None and (other := str(result["truth_clips"][name])) != count:
            count = f"{count} / {other}"
        rows.append([label, shown, count, *papers])
    return f"{_aligned(rows)}\n{_NOTE}"


def table_of_sounds(result: dict) -> str:
    """The metrics of `evaluate_sounds`."""
    rows = [["", "this", "clips"]]
    for name, value in result["metrics"].items():
        label, form = METRICS[name][:2] if name in METRICS else (name.replace("_", " "), ".3f")
        rows.append([label, format(value, form), str(result["clips"][name])])
    return _aligned(rows)


def _aligned(rows: list[list[str]]) -> str:
    """Rows of cells as text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)

"""The page of `vcm_jax.compare`: metrics with intervals, differences, winners, and some clips."""

from pathlib import Path

import numpy as np

from vcm_jax.evaluation.comparison import DECIDING, Compared, is_video, winners
from vcm_jax.evaluation.sounds import SAMPLE_RATE, read_pair
from vcm_jax.media import page
from vcm_jax.media.read import probe
from vcm_jax.metrics import SoundMetrics, detect_onsets, merge_close
from vcm_jax.metrics.sounds import METRICS

Draws = dict[str, dict[str, np.ndarray]]  # set -> metric -> draws, from `bootstrap`

_EXPLANATION = (
    "Compared with the true sounds, at 16 kHz, from waveforms alone: this project's own metrics, "
    "not the papers'. Onset F1: onsets detected in both sounds, with a tolerance of 50 ms. Log-mel "
    "FD: Frechet distance of single log-mel frames. It grows as the number of clips shrinks; its "
    "intervals lie too high if there are few clips. Spectral convergence and log-mel error compare "
    "spectrograms frame by frame, loudness error A-weighted levels. Many sounds fit one picture: a "
    "good sound need not score 0."
)


def _interval(draws: np.ndarray) -> tuple[float, float] | None:
    finite = draws[np.isfinite(draws)]
    return tuple(np.percentile(finite, (2.5, 97.5))) if len(finite) else None


def _cell(value: float, interval: tuple[float, float] | None, form: str, bold: bool = False):
    """A value above its interval."""
    shown = "-" if interval is None else f"[{interval[0]:{form}}, {interval[1]:{form}}]"
    number = page.element("span", f"{value:{form}}", class_="win" if bold else None)
    return page.lines(number, page.element("small", shown))


def table_of_metrics(sets: dict[str, SoundMetrics], draws: Draws) -> page.Html:
    rows = []
    for name, metrics in sets.items():
        values = metrics.values()
        cells = [
            _cell(values[key], _interval(draws[name][key]), metric.format)
            for key, metric in METRICS.items()
        ]
        rows.append([name, *cells])
    arrows = [
        f"{metric.label} {'↓' if metric.less_is_better else '↑'}" for metric in METRICS.values()
    ]
    return page.table(["", *arrows], rows)


def table_of_differences(sets: dict[str, SoundMetrics], draws: Draws) -> page.Html:
    """Each set minus the first; bold if the interval does not contain 0, in either direction."""
    first, *others = sets
    base, rows = sets[first].values(), []
    for name in others:
        values, cells = sets[name].values(), []
        for key, metric in METRICS.items():
            interval = _interval(draws[name][key] - draws[first][key])
            if interval is None:
                cells.append("-")
                continue
            sure = interval[0] > 0 or interval[1] < 0
            signed = metric.format.replace(".", "+.")
            cells.append(_cell(values[key] - base[key], interval, signed, sure))
        rows.append([name, *cells])
    return page.table([f"minus {first}", *(metric.label for metric in METRICS.values())], rows)


def table_of_wins(sets: dict[str, SoundMetrics]) -> page.Html:
    won = {metric: winners(sets, metric) for metric in DECIDING}
    rows = [[name, *(won[metric].count(name) for metric in DECIDING)] for name in sets]
    rows.append(["nobody (equal)", *(won[metric].count(None) for metric in DECIDING)])
    return page.table(["clips won", *(label for label, _ in DECIDING.values())], rows)


def clip_section(compared: Compared, index: int, duration: float) -> page.Html:
    """One clip: its picture, the true sound, and every set's sound with its metrics."""
    clip, sets, paths = compared.clips[index], compared.sets, compared.paths
    won = {metric: winners(sets, metric)[index] for metric in DECIDING}
    truth = read_pair(paths[next(iter(sets))][clip.id], clip.path, duration)[1]
    title = f"{clip.id}: {clip.caption}" if clip.caption else clip.id
    parts = [page.element("h3", title)]
    if is_video(clip.path) and probe(clip.path).has_video:
        strip = page.film_strip(clip.path, len(truth) / SAMPLE_RATE)
        parts += [page.element("div"), page.element("figure", strip)]
    marks = merge_close(detect_onsets(truth, SAMPLE_RATE))
    rows = [("true sound", truth, [])]
    for name, metrics in sets.items():
        shown = []
        for metric, (label, _) in DECIDING.items():
            best = won[metric] == name and len(sets) > 1
            value = f"{label} {metrics.per_clip[metric][index]:.3g}"
            shown.append(page.element("span", value, class_="win" if best else None))
        rows.append((name, read_pair(paths[name][clip.id], clip.path, duration)[0], shown))
    for number, (name, sound, shown) in enumerate(rows, 1):
        picture = page.spectrogram(sound, SAMPLE_RATE, marks, label=number == len(rows))
        note = page.element("small", page.lines(*shown))
        parts.append(page.element("div", name, page.player(sound, SAMPLE_RATE), note))
        parts.append(page.element("figure", picture))
    return page.element("div", parts, class_="clip")


def _note(*text: str) -> page.Html:
    return page.element("p", *text, class_="note")


def write_comparison(out: Path, compared: Compared, draws: Draws, shown: int, duration: float):
    """Writes the page.

    Args:
      out: the HTML file.
      compared: from `score_entries`.
      draws: from `bootstrap`.
      shown: number of clips in the page, evenly spaced over all of them.
      duration: seconds compared, as for `score_entries`.

    Raises:
      OSError: the page cannot be written.
    """
    clips, sets = compared.clips, compared.sets
    count = len(next(iter(next(iter(draws.values())).values())))
    parts = [
        page.element("h1", "Sounds side by side"),
        page.element(
            "p",
            f"{len(clips)} clips, the same for every set. In brackets: 95% bootstrap intervals "
            f"over clips ({count} draws).",
        ),
    ]
    if compared.left_out:
        rows = list(compared.left_out.items())
        parts.append(_note(f"{len(rows)} clips were left out of all sets:"))
        parts.append(page.table(["clip", "reason"], rows, class_="text"))
    parts.append(table_of_metrics(sets, draws))
    if len(sets) > 1:
        parts += [
            page.element("h2", "Differences"),
            _note(
                "Over the same draws of clips; bold where the interval does not contain 0. "
                "Intervals reflect the choice of clips, not another training run or other noise."
            ),
            table_of_differences(sets, draws),
            page.element("h2", "Winners, clip by clip"),
            table_of_wins(sets),
        ]
    silent = len(clips) - next(iter(sets.values())).counts()["spectral_convergence"]
    extra = f" {silent} true sounds are silent and have no spectral convergence." if silent else ""
    chosen = np.unique(np.linspace(0, len(clips) - 1, min(shown, len(clips))).round().astype(int))
    parts += [
        _note(_EXPLANATION, extra),
        page.element("h2", "Clips"),
        _note("Evenly spaced over all clips; dotted: onsets of the true sound; bold: best."),
        [clip_section(compared, int(index), duration) for index in chosen],
    ]
    page.write_document(out, "vcm_jax: sounds side by side", *parts)

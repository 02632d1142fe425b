"""Several runs and folders of sounds side by side: one self-contained HTML page.

    python -m vcm_jax.compare RUN_A RUN_B@4 SOUNDS ... --truth=VIDEOS --out=report.html

Figures against the true sounds with bootstrap intervals, differences to the first set, which set
wins how many clips, and some clips to hear and see. A run (a workdir of `vcm_jax.main`) generates
sound for the videos of --truth, in --steps network evaluations or as many as stand after its @; a
folder has one sound for each clip, under its name. All figures are this project's own, from
waveforms alone, and compare sets with each other, not with papers.
"""

import dataclasses
import html
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import app, flags, logging
from tqdm import tqdm

from vcm_jax import sampling
from vcm_jax.atomic import atomic_path
from vcm_jax.cli import show_ours
from vcm_jax.evaluation.caches import EvaluateError
from vcm_jax.evaluation.sounds import SAMPLE_RATE, read_pair
from vcm_jax.generation.clips import Request, encode_request, generate, write
from vcm_jax.generation.run import load_run
from vcm_jax.interop.state_dict import list_few
from vcm_jax.media import page
from vcm_jax.media.clips import SOUND_SUFFIXES, VIDEO_SUFFIXES, Clip, list_clips
from vcm_jax.media.read import probe
from vcm_jax.metrics import detect_onsets, merge_close
from vcm_jax.metrics.sounds import FIGURES, SoundFigures, bootstrap

# What decides a clip: name -> (how it is shown, whether less is better).
_DECIDING = {
    "onset_f1": ("onset F1", False),
    "log_mel_error": ("log-mel error, dB", True),
    "spectral_convergence": ("spectral convergence", True),
    "loudness_error_db": ("loudness error, dB", True),
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One of the sets that are compared: a run, with its number of steps, or a folder of sounds."""

    label: str
    path: Path
    steps: int | None


def parse_entries(arguments: Sequence[str], steps: int) -> list[Entry]:
    """Runs and folders from the command line; `RUN@4` is a run in 4 steps.

    Raises:
      EvaluateError: none, one that is neither, or one that is there twice.
    """
    if not arguments:
        raise EvaluateError("name at least one run or folder of sounds")
    entries = []
    for argument in arguments:
        name, _, given = argument.rpartition("@")
        path, given = (Path(name), int(given)) if name and given.isdigit() else (Path(argument), 0)
        if not path.is_dir():
            raise EvaluateError(f"{path}: no such folder")
        is_run = (path / "run.json").exists()
        if given and not is_run:
            raise EvaluateError(f"{argument}: {path} is not the workdir of a run, it has no steps")
        num = (given or steps) if is_run else None
        label = f"{path.name or path}" + (f", {num} step{'s' * (num > 1)}" if num else "")
        entries.append(Entry(label, path, num))
    labels = [entry.label for entry in entries]
    if len(set(labels)) < len(labels):  # folders of one name in different places
        entries = [dataclasses.replace(e, label=e.label.replace(e.path.name, str(e.path), 1))
                   for e in entries]  # fmt: skip
    if len({(entry.path.resolve(), entry.steps) for entry in entries}) < len(entries):
        raise EvaluateError("one of the sets is named twice")
    return entries


def true_clips(truth, captions, limit: int) -> list[Clip]:
    """The first `limit` clips of the folder of the true sounds.

    Raises:
      ListError, EvaluateError: no such folder, ambiguous names, or fewer than two clips.
    """
    clips, failures = list_clips(truth, captions, VIDEO_SUFFIXES + SOUND_SUFFIXES)
    if failures:
        raise EvaluateError(f"{captions or truth}: {failures[0][0]}: {failures[0][1]}")
    if len(clips) < 2:
        raise EvaluateError(f"{truth}: {len(clips)} clips, at least 2 are needed")
    return clips[:limit]


def _is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES


def sounds_of(entry: Entry, clips: list[Clip], folder: Path, seed: int, duration: float) -> dict:
    """Clip id -> file of its sound in this set; a run writes them into `folder`.

    Raises:
      EvaluateError: clips without a sound, or without a picture for a run.
      ValueError: a run that cannot be loaded, a video that cannot be read.
    """
    if entry.steps is None:
        found, failures = list_clips(entry.path, None, SOUND_SUFFIXES + VIDEO_SUFFIXES)
        if failures:
            raise EvaluateError(f"{entry.path}: {failures[0][0]}: {failures[0][1]}")
        there = {clip.id: clip.path for clip in found}
        if lacking := [clip.id for clip in clips if clip.id not in there]:
            raise EvaluateError(
                f"{entry.path} has no sound for {len(lacking)} of {len(clips)} clips: "
                + list_few(lacking)
            )
        return {clip.id: there[clip.id] for clip in clips}
    if silent := [clip.id for clip in clips if not _is_video(clip.path)]:
        raise EvaluateError(
            f"{entry.path} is a run and needs videos, but --truth has only sounds for "
            f"{list_few(silent)}: generate first and give the folder"
        )
    logging.info("%s: generating sound for %d clips", entry.label, len(clips))
    run = load_run(entry.path)
    requests = (Request(clip.id, clip.path, clip.caption) for clip in clips)
    items = (encode_request(r, run, duration or None) for r in requests)
    paths, times = {}, sampling.uniform_times(entry.steps)
    made = generate(run, items, times, seed, batch_size=min(8, len(clips)))
    for item, sound in tqdm(made, total=len(clips), desc="Generating", unit="clip"):
        path = folder / f"{item.request.id}.wav"
        write(item, sound, run.codec.sample_rate, path)
        paths[item.request.id] = path
    return paths


def score(paths: dict, clips: list[Clip], duration: float) -> SoundFigures:
    """Figures of one set on all clips, in their order.

    Raises: ValueError for sounds that do not compare; it names the file.
    """
    figures = SoundFigures(SAMPLE_RATE)
    for clip in tqdm(clips, desc="Comparing", unit="clip"):
        figures.add(clip.id, *read_pair(paths[clip.id], clip.path, duration))
    return figures


def winners(sets: dict[str, SoundFigures], figure: str) -> list[str | None]:
    """Who wins each clip by a figure of `SoundFigures.per_clip`; None for a tie or no number.

    Figures that agree in the three digits that the page shows are a tie.
    """
    shown = lambda values: [float(f"{value:.3g}") for value in values]
    values = np.array([shown(figures.per_clip[figure]) for figures in sets.values()])
    values = values if _DECIDING[figure][1] else -values
    names, found = list(sets), []
    for column in values.T:
        best = np.flatnonzero(column == column.min()) if np.isfinite(column).all() else []
        found.append(names[best[0]] if len(best) == 1 else None)
    return found


def _interval(draws: np.ndarray) -> tuple[float, float] | None:
    finite = draws[np.isfinite(draws)]
    return tuple(np.percentile(finite, (2.5, 97.5))) if len(finite) else None


def _table_of_figures(sets, draws) -> str:
    rows = []
    for name, figures in sets.items():
        values, cells = figures.values(), []
        for key, (_, form, _) in FIGURES.items():
            interval = _interval(draws[name][key])
            shown = "-" if interval is None else f"[{interval[0]:{form}}, {interval[1]:{form}}]"
            cells.append(f"{values[key]:{form}}<br><small>{shown}</small>")
        rows.append([html.escape(name), *cells])
    heads = [f"{label} {'↓' if less else '↑'}" for label, _, less in FIGURES.values()]
    return page.table(["", *heads], rows)


def _table_of_differences(sets, draws) -> str:
    """Each set minus the first; bold where the interval leaves 0 out, in whichever direction."""
    first, *others = sets
    rows = []
    for name in others:
        cells = []
        for key, (_, form, _) in FIGURES.items():
            value = sets[name].values()[key] - sets[first].values()[key]
            interval = _interval(draws[name][key] - draws[first][key])
            if interval is None:
                cells.append("-")
                continue
            sure = "win" if interval[0] > 0 or interval[1] < 0 else ""
            signed = form.replace(".", "+.")
            shown = f"[{interval[0]:{signed}}, {interval[1]:{signed}}]"
            cells.append(f"<span class='{sure}'>{value:{signed}}</span><br><small>{shown}</small>")
        rows.append([html.escape(name), *cells])
    return page.table([f"minus {first}", *(label for label, _, _ in FIGURES.values())], rows)


def _table_of_wins(sets) -> str:
    won = {figure: winners(sets, figure) for figure in _DECIDING}
    rows = [
        [html.escape(name), *(str(won[figure].count(name)) for figure in _DECIDING)]
        for name in sets
    ]
    rows.append(["nobody (equal)", *(str(won[figure].count(None)) for figure in _DECIDING)])
    return page.table(["clips won", *(label for label, _ in _DECIDING.values())], rows)


def _clip(index: int, clip: Clip, sets, paths, duration: float) -> str:
    """One clip: its picture, the true sound, and every set's sound with its figures."""
    won = {figure: winners(sets, figure)[index] for figure in _DECIDING}
    truth = read_pair(paths[next(iter(sets))][clip.id], clip.path, duration)[1]
    caption = f": {clip.caption}" if clip.caption else ""
    parts = [f"<div class=clip><h3>{html.escape(clip.id + caption)}</h3>"]
    if _is_video(clip.path) and probe(clip.path).has_video:
        strip = page.film_strip(clip.path, len(truth) / SAMPLE_RATE)
        parts.append(f"<div></div><figure>{strip}</figure>")
    marks = merge_close(detect_onsets(truth, SAMPLE_RATE))
    rows = [("true sound", truth, "")]
    for name, figures in sets.items():
        shown = []
        for figure, (label, _) in _DECIDING.items():
            value = figures.per_clip[figure][index]
            best = won[figure] == name and len(sets) > 1
            shown.append(f"<span class='{'win' if best else ''}'>{label} {value:.3g}</span>")
        sound = read_pair(paths[name][clip.id], clip.path, duration)[0]
        rows.append((name, sound, "<br>".join(shown)))
    for i, (name, sound, note) in enumerate(rows):
        shown = page.spectrogram(sound, SAMPLE_RATE, marks, label=i == len(rows) - 1)
        parts.append(
            f"<div>{html.escape(name)}{page.player(sound, SAMPLE_RATE)}<small>{note}</small></div>"
            f"<figure>{shown}</figure>"
        )
    return "\n".join([*parts, "</div>"])


def compare(
    entries: list[Entry],
    clips: list[Clip],
    out: Path,
    *,
    shown: int = 6,
    draws: int = 1000,
    seed: int = 0,
    duration: float = 0.0,
) -> dict[str, SoundFigures]:
    """Scores all sets on all clips and writes the page.

    Args:
      entries: from `parse_entries`; clips: from `true_clips`; out: the html file.
      shown: clips in the page, evenly spaced over all of them.
      draws: of the bootstrap; seed: of it and of the runs' noise.
      duration: seconds from the start that are compared; 0: sounds of equal length, whole.

    Returns:
      label -> SoundFigures.

    Raises:
      ValueError: a set that lacks clips or cannot be compared; nothing is written then.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths, sets = {}, {}
        for i, entry in enumerate(entries):
            place = Path(folder) / str(i)
            paths[entry.label] = sounds_of(entry, clips, place, seed, duration)
        for entry in entries:
            logging.info("%s: comparing", entry.label)
            sets[entry.label] = score(paths[entry.label], clips, duration)
        logging.info("bootstrap, %d draws of %d clips", draws, len(clips))
        drawn = bootstrap(sets, draws, seed)
        lines = [
            "<h1>Sounds side by side</h1>",
            f"<p>{len(clips)} clips, the same for every set. In brackets: 95% bootstrap intervals "
            f"over clips ({draws} draws).</p>",
            _table_of_figures(sets, drawn),
        ]
        if len(sets) > 1:
            lines += [
                "<h2>Differences</h2><p class=note>Over the same draws of clips; bold where the "
                "interval leaves 0 out. Intervals tell of the choice of clips, not of another "
                "training run or other noise.</p>",
                _table_of_differences(sets, drawn),
                "<h2>Winners, clip by clip</h2>",
                _table_of_wins(sets),
            ]
        silent = len(clips) - next(iter(sets.values())).counts()["spectral_convergence"]
        lines += [
            "<p class=note>Against the true sounds, at 16 kHz, from waveforms alone: this "
            "project's own figures, not the papers'. Onset F1: onsets detected in both sounds, "
            "50 ms. Log-mel FD: Frechet distance of single log-mel frames; it grows as clips get "
            "fewer, and with it its intervals, which lie too high for few clips. Spectral "
            "convergence "
            "and log-mel error compare spectrograms frame by frame, loudness error A-weighted "
            "levels: many sounds fit one picture, so that a good sound need not score 0."
            + (f" {silent} true sounds are silent and have no spectral convergence." * bool(silent))
            + "</p><h2>Clips</h2><p class=note>Evenly spaced over all clips; dotted: onsets of the "
            "true sound; bold: best of the clip.</p>",
        ]
        count = min(shown, len(clips))
        for index in np.unique(np.linspace(0, len(clips) - 1, count).round().astype(int)):
            lines.append(_clip(int(index), clips[index], sets, paths, duration))
    with atomic_path(out) as path:
        path.write_text(page.document("vcm_jax: sounds side by side", lines), encoding="utf-8")
    return sets


def _define_flags():
    flags.DEFINE_string("truth", None, "Folder of the videos (or true sounds).", required=True)
    flags.DEFINE_string("out", None, "The page, an .html file.", required=True)
    flags.DEFINE_string("captions", None, "TSV with columns id and caption: prompts for the runs.")
    flags.DEFINE_integer("steps", 1, "Network evaluations of a run without @N.", lower_bound=1)
    flags.DEFINE_integer("clips", 200, "At most so many clips.", lower_bound=2)
    flags.DEFINE_integer("shown", 6, "Clips in the page.", lower_bound=1)
    flags.DEFINE_integer("draws", 1000, "Bootstrap draws.", lower_bound=100)
    flags.DEFINE_float("duration", 0.0, "Seconds compared from the start (0: all).")
    flags.DEFINE_integer("seed", 0, "Of the runs' noise and the bootstrap.")


def main(argv):
    show_ours()
    args = flags.FLAGS
    out = Path(args.out)
    try:
        entries = parse_entries(argv[1:], args.steps)
        if out.suffix != ".html" or out.is_dir():
            raise EvaluateError(f"--out={out}: an .html file is wanted")
        clips = true_clips(args.truth, args.captions, args.clips)
        sets = compare(
            entries, clips, out, shown=args.shown, draws=args.draws, seed=args.seed,
            duration=args.duration,
        )  # fmt: skip
    except ValueError as error:
        sys.exit(f"error: {error}")
    for name, figures in sets.items():
        values = figures.values()
        shown = "  ".join(f"{FIGURES[k][0]} {v:{FIGURES[k][1]}}" for k, v in values.items())
        print(f"{name}: {shown}")
    print(f"{len(clips)} clips: {out}")


if __name__ == "__main__":
    _define_flags()
    app.run(main)

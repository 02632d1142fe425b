"""Runs and folders of sounds, scored against the same true sounds (see `vcm_jax.compare`)."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import logging
from tqdm import tqdm

from vcm_jax import sampling
from vcm_jax.cli import describe
from vcm_jax.evaluation.caches import EvaluateError
from vcm_jax.evaluation.sounds import SAMPLE_RATE, read_pair, sounds_by_key
from vcm_jax.generation.clips import Request
from vcm_jax.generation.finish import Finish
from vcm_jax.generation.outputs import generate_files
from vcm_jax.generation.run import load_run
from vcm_jax.interop.state_dict import list_few
from vcm_jax.media.clips import SOUND_SUFFIXES, VIDEO_SUFFIXES, Clip, list_clips
from vcm_jax.media.names import output_name
from vcm_jax.metrics import SoundMetrics
from vcm_jax.objectives import read_section
from vcm_jax.runs import description

# Metrics by which a clip is won: name -> (label, whether less is better).
DECIDING = {
    "onset_f1": ("onset F1", False),
    "log_mel_error": ("log-mel error, dB", True),
    "spectral_convergence": ("spectral convergence", True),
    "loudness_error_db": ("loudness error, dB", True),
}
_STEPS = re.compile(r"(.+)@(\d+)()")  # of a run: PATH@STEPS
_STEPS_AND_SCALE = re.compile(r"(.+)@(\d+)@(\d+(?:\.\d+)?)")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One of the sets that are compared.

    Attributes:
      label: how it is called.
      path: the workdir of a run, or a folder of sounds.
      steps: of the run's sampler; None for a folder of sounds.
      guidance_scale: of the run's sampler; None for the run's own.
    """

    label: str
    path: Path
    steps: int | None
    guidance_scale: float | None = None


@dataclasses.dataclass
class Compared:
    """The sets on the clips that all of them have.

    Attributes:
      clips: the clips that were compared.
      sets: label -> metrics, over these clips in this order.
      paths: label -> {id: file of the sound}.
      left_out: {id: reason} of the other clips.
    """

    clips: list[Clip]
    sets: dict[str, SoundMetrics]
    paths: dict[str, dict[str, Path]]
    left_out: dict[str, str]


def is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES


def parse_entries(arguments: Sequence[str], steps: int) -> list[Entry]:
    """Runs and folders from the command line.

    `RUN@4` is a run with 4 steps, `RUN@4@2.5` the same with guidance scale 2.5, and RUN a run with
    `steps`.

    Raises:
      EvaluateError: no argument, one that is neither a run nor a folder, or one that is repeated.
    """
    if not arguments:
        raise EvaluateError("name at least one run or folder of sounds")
    entries = [_parse_entry(argument, steps) for argument in arguments]
    labels = [entry.label for entry in entries]
    if len(set(labels)) < len(labels):  # folders of one name in different places
        entries = [
            dataclasses.replace(
                entry, label=_label(str(entry.path), entry.steps, entry.guidance_scale)
            )
            for entry in entries
        ]
    different = {(entry.path.resolve(), entry.steps, entry.guidance_scale) for entry in entries}
    if len(different) < len(entries):
        raise EvaluateError("one of the sets is named twice")
    return entries


def _parse_entry(argument: str, steps: int) -> Entry:
    path, given, scale = Path(argument), None, None
    for pattern in _STEPS, _STEPS_AND_SCALE:  # names of folders may have an @, too
        if not path.is_dir() and (match := pattern.fullmatch(argument)):
            path, given = Path(match[1]), int(match[2])
            scale = float(match[3]) if match[3] else None
    if not path.is_dir():
        raise EvaluateError(f"{path}: no such folder")
    if given == 0:
        raise EvaluateError(f"{argument}: a run takes at least 1 step")
    is_run = description.is_run(path)
    if given is not None and not is_run:
        raise EvaluateError(f"{argument}: {path} is not the workdir of a run, it has no steps")
    count = (given or steps) if is_run else None
    return Entry(_label(path.name or str(path), count, scale), path, count, scale)


def _label(name: str, steps: int | None, scale: float | None) -> str:
    if steps is None:
        return name
    guidance = "" if scale is None else f", guidance {scale:g}"
    return f"{name}, {steps} step{'s' * (steps > 1)}{guidance}"


def true_clips(truth, captions, limit: int) -> list[Clip]:
    """The first `limit` clips in the folder of the true sounds.

    Raises:
      ListError, EvaluateError: no such folder, ambiguous names, or fewer than two clips.
    """
    clips, failures = list_clips(truth, captions, VIDEO_SUFFIXES + SOUND_SUFFIXES)
    if failures:
        raise EvaluateError(f"{captions or truth}: {failures[0][0]}: {failures[0][1]}")
    if len(clips) < 2:
        raise EvaluateError(f"{truth}: {len(clips)} clips, at least 2 are needed")
    return clips[:limit]


def check_entry(entry: Entry, clips: Sequence[Clip]) -> dict[str, Path]:
    """{id: file} of a folder's sounds; {} for a run. Checks before any work that none is missing.

    Raises:
      EvaluateError: clips without a sound, or without a picture for a run, or a guidance scale that
        does not fit the run.
    """
    if entry.guidance_scale is not None:
        objective, _ = read_section(description.read(entry.path).config["objective"])
        try:
            sampling.Sampler(entry.guidance_scale).check(objective)
        except ValueError as error:
            raise EvaluateError(f"{entry.path}: {error}") from None
    if entry.steps is None:
        there, _ = sounds_by_key(entry.path)
        keys = {clip.id: output_name(clip.id) for clip in clips}
        if lacking := [clip_id for clip_id, key in keys.items() if key not in there]:
            raise EvaluateError(
                f"{entry.path} has no sound for {len(lacking)} of {len(clips)} clips: "
                + list_few(lacking)
            )
        return {clip_id: there[key] for clip_id, key in keys.items()}
    if silent := [clip.id for clip in clips if not is_video(clip.path)]:
        raise EvaluateError(
            f"{entry.path} is a run and needs videos, but --truth has only sounds for "
            f"{list_few(silent)}: generate first and give the folder"
        )
    return {}


def generate_entry(
    entry: Entry,
    clips: Sequence[Clip],
    folder: Path,
    seed: int,
    duration: float,
    left_out: dict[str, str],
) -> dict[str, Path]:
    """{id: file} of the sounds that a run makes, in `folder`; failures are added to `left_out`.

    Raises:
      ValueError: the run cannot be loaded.
    """
    logging.info("%s: generating sound for %d clips", entry.label, len(clips))
    wanted = [
        (Request(clip.id, clip.path, clip.caption), folder / f"{output_name(clip.id)}.wav")
        for clip in clips
    ]
    run = load_run(entry.path)
    made = generate_files(
        dataclasses.replace(run, sampler=sampling.Sampler(entry.guidance_scale)),
        wanted,
        sampling.uniform_times(entry.steps),
        seeds=(seed,),
        batch_size=min(8, len(clips)),
        duration=duration or None,
        finish=Finish(keep=True),
    )
    for clip_id, reason in tqdm(made, "Generating", len(clips), unit="clip"):
        if reason is not None:
            left_out[clip_id] = f"{entry.label}: {reason}"
    return {request.id: path for request, path in wanted if request.id not in left_out}


def _score(
    entries: Sequence[Entry],
    paths: dict[str, dict[str, Path]],
    clips: Sequence[Clip],
    duration: float,
    left_out: dict[str, str],
) -> tuple[dict[str, SoundMetrics], list[Clip]]:
    """Metrics of all sets on the clips that can be compared in all of them."""
    sets = {entry.label: SoundMetrics(SAMPLE_RATE) for entry in entries}
    compared = []
    for clip in tqdm(clips, desc="Comparing", unit="clip"):
        if clip.id in left_out:
            continue
        one = {label: SoundMetrics(SAMPLE_RATE) for label in sets}
        try:
            for label, metrics in one.items():
                metrics.add(clip.id, *read_pair(paths[label][clip.id], clip.path, duration))
        except EvaluateError:  # of the set, not of the clip: lengths that do not fit
            raise
        except Exception as error:
            left_out[clip.id] = describe(error)
            continue
        for label, metrics in one.items():
            sets[label].extend(metrics)
        compared.append(clip)
    return sets, compared


def score_entries(
    entries: Sequence[Entry],
    clips: Sequence[Clip],
    folder: Path,
    *,
    seed: int = 0,
    duration: float = 0.0,
) -> Compared:
    """Scores all sets on all clips; a clip that fails in one of them is left out of all.

    Args:
      entries: from `parse_entries`.
      clips: from `true_clips`.
      folder: where runs write their sounds.
      seed: of the runs' noise, any integer.
      duration: seconds compared, from the start; 0: whole sounds, which must have equal lengths.

    Raises:
      ValueError: a set that lacks clips or cannot be compared, or fewer than two clips remain.
    """
    left_out: dict[str, str] = {}
    paths = {entry.label: check_entry(entry, clips) for entry in entries}
    for number, entry in enumerate(entries):
        if entry.steps is not None:
            place = folder / str(number)
            paths[entry.label] = generate_entry(entry, clips, place, seed, duration, left_out)
    sets, compared = _score(entries, paths, clips, duration, left_out)
    if len(compared) < 2:
        clip_id, reason = next(iter(left_out.items()))
        raise EvaluateError(f"fewer than 2 clips can be compared, the first: {clip_id}: {reason}")
    return Compared(compared, sets, paths, left_out)


def winners(sets: dict[str, SoundMetrics], metric: str) -> list[str | None]:
    """Which set wins each clip by a metric of `SoundMetrics.per_clip`; None for a tie or no number.

    Values that agree in the three digits that the page shows are a tie.
    """

    def rounded(values: list[float]) -> list[float]:
        return [float(f"{value:.3g}") for value in values]

    values = np.array([rounded(metrics.per_clip[metric]) for metrics in sets.values()])
    values = values if DECIDING[metric][1] else -values
    names, found = list(sets), []
    for column in values.T:
        best = np.flatnonzero(column == column.min()) if np.isfinite(column).all() else []
        found.append(names[best[0]] if len(best) == 1 else None)
    return found

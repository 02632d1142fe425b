"""Our own figures, from two folders of sounds (see `vcm_jax.evaluate`)."""

import math
from pathlib import Path

import numpy as np
from tqdm import tqdm

from vcm_jax import metrics
from vcm_jax.evaluation.caches import EvaluateError
from vcm_jax.interop.av_benchmark import stored_sample_rate
from vcm_jax.interop.state_dict import list_few
from vcm_jax.media.clips import SOUND_SUFFIXES, VIDEO_SUFFIXES, list_clips
from vcm_jax.media.read import read_audio
from vcm_jax.metrics.sounds import SoundFigures

SAMPLE_RATE = 16_000  # Hz: all sounds are compared at it
_APART = 0.1  # seconds by which two sounds of a clip may differ in length


def pair_sounds(pred: Path, truth: Path, allow_unpaired: bool):
    """[(clip, its file in pred, its file in truth)], and the clips that one side alone has."""
    kinds = SOUND_SUFFIXES + VIDEO_SUFFIXES
    sides = {}
    for side, folder in (("pred", pred), ("truth", truth)):
        clips, failures = list_clips(folder, None, kinds)
        if failures:
            raise EvaluateError(f"{folder}: {failures[0][0]} is ambiguous ({failures[0][1]})")
        sides[side] = {clip.id: clip.path for clip in clips}
    lacking = {
        "pred": sorted(sides["pred"].keys() - sides["truth"].keys()),
        "truth": sorted(sides["truth"].keys() - sides["pred"].keys()),
    }
    if any(lacking.values()) and not allow_unpaired:
        shown = "; ".join(
            f"{len(clips)} only in {side}: {list_few(clips)}"
            for side, clips in lacking.items()
            if clips
        )
        raise EvaluateError(
            f"{pred} and {truth} do not pair: {shown}; --allow_unpaired makes figures of those "
            "that do"
        )
    pairs = [
        (clip, path, sides["truth"][clip])
        for clip, path in sides["pred"].items()
        if clip in sides["truth"]
    ]
    if len(pairs) < 2:
        raise EvaluateError(f"{pred} and {truth} have {len(pairs)} clips in common: 2 are needed")
    return pairs, {side: clips for side, clips in lacking.items() if clips}


def read_pair(pred: Path, truth: Path, duration: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Two sounds of a clip at 16 kHz, mono, of equal length: their first `duration` seconds.

    Raises:
      MediaError: unreadable, or shorter than `duration`.
      EvaluateError: without a duration, lengths that differ by more than 0.1 s; not finite.
    """
    samples = round(duration * SAMPLE_RATE) or None
    sounds = [read_audio(path, SAMPLE_RATE, samples, duration) for path in (pred, truth)]
    lengths = [len(sound) for sound in sounds]
    if abs(lengths[0] - lengths[1]) > _APART * SAMPLE_RATE:
        raise EvaluateError(
            f"{pred}: {lengths[0] / SAMPLE_RATE:.2f} s, the true sound {truth} has "
            f"{lengths[1] / SAMPLE_RATE:.2f} s: give --duration to compare as much from the start"
        )
    for path, sound in zip((pred, truth), sounds):
        if not np.isfinite(sound).all():
            raise EvaluateError(f"{path}: holds samples that are not finite")
    return tuple(sound[: min(lengths)] for sound in sounds)


def evaluate_sounds(
    pred, truth, captions=None, duration: float = 0.0, allow_unpaired: bool = False
) -> dict:
    """Our own figures of two folders of sounds (or videos with sound), paired by file name.

    Args:
      pred, truth: folders; sounds are mixed down to mono and resampled to 16 kHz.
      captions: TSV with the columns id and caption, or None: no caption accuracy.
      duration: seconds from the start of each that are compared; 0: all of sounds of equal length.
      allow_unpaired: make figures of the clips that pair, and report the others.

    Returns:
      As `evaluate_caches`; see `SoundFigures` and `caption_accuracy` for the figures.

    Raises:
      EvaluateError, MediaError, ListError: clips that do not pair, or of differing lengths.
    """
    pairs, missing = pair_sounds(Path(pred), Path(truth), allow_unpaired)
    named = {}
    if captions is not None:
        for folder in (truth, pred):  # ids may name files of either
            clips, _ = list_clips(folder, captions, SOUND_SUFFIXES + VIDEO_SUFFIXES)
            named |= {clip.path.absolute(): clip.caption for clip in clips}
        lacking = [clip for clip, one, _ in pairs if one.absolute() not in named]
        if lacking:
            raise EvaluateError(f"{captions}: no row for {len(lacking)} clips: {list_few(lacking)}")
    figures, heard = SoundFigures(SAMPLE_RATE), []
    for clip, one, other in tqdm(pairs, desc="Comparing", unit="clip"):
        sounds = read_pair(one, other, duration)
        figures.add(clip, *sounds)
        if named:
            heard.append((*sounds, named[one.absolute()]))
    found, clips, left_out = figures.values(), figures.counts(), {}
    if named:
        try:
            accuracy = metrics.caption_accuracy(*zip(*heard), SAMPLE_RATE)
        except ValueError as error:
            left_out["caption_accuracy"] = str(error)
        else:
            for key in ("accuracy", "true_accuracy", "chance"):
                found[f"caption_{key}"] = accuracy[key]
                clips[f"caption_{key}"] = accuracy["clips"]
    else:
        left_out["caption_accuracy"] = "needs --captions"
    rates = {side: stored_sample_rate(pairs[0][i]) for side, i in (("pred", 1), ("truth", 2))}
    notes = [f"compared at {SAMPLE_RATE} Hz"] if set(rates.values()) != {SAMPLE_RATE} else []
    silent = len(pairs) - clips["spectral_convergence"]
    if silent:
        notes.append(f"{silent} true sounds are digital silence: no spectral convergence for them")
    return {
        "figures": {name: value for name, value in found.items() if math.isfinite(value)},
        "clips": clips,
        "truth_clips": clips,
        "missing": {"sounds": missing} if missing else {},
        "left_out": left_out
        | {name: "nothing to count" for name, value in found.items() if not math.isfinite(value)},
        "notes": notes,
    }

"""Our own metrics, from two folders of sounds (see `vcm_jax.evaluate`)."""

import math
from pathlib import Path

import numpy as np
from tqdm import tqdm

from vcm_jax import metrics
from vcm_jax.cli import describe
from vcm_jax.evaluation.caches import EvaluateError
from vcm_jax.interop.av_benchmark import stored_sample_rate
from vcm_jax.interop.state_dict import list_few
from vcm_jax.media.clips import SOUND_SUFFIXES, VIDEO_SUFFIXES, list_clips
from vcm_jax.media.names import output_name, pairing_key
from vcm_jax.media.read import read_audio
from vcm_jax.media.write import find_as_made
from vcm_jax.metrics import SoundMetrics

SAMPLE_RATE = 16_000  # Hz: all sounds are compared at this rate
_APART = 0.1  # seconds by which the two sounds of a clip may differ in length
_KINDS = SOUND_SUFFIXES + VIDEO_SUFFIXES


def sounds_by_key(folder, captions=None) -> tuple[dict[str, Path], dict[str, str]]:
    """The sounds (or videos with sound) of a folder by what pairs them, see `pairing_key`.

    Args:
      folder: searched with its subfolders.
      captions: TSV whose rows name some of the files: these get the key of their id.

    Returns:
      {key: file}, and {key: caption} of those that the TSV names.

    Raises:
      EvaluateError: two files have the same key.
      ListError: no such folder, no sounds in it, or a list that cannot be read.
    """
    found, failures = list_clips(folder, None, _KINDS)
    if failures:
        raise EvaluateError(f"{folder}: {failures[0][0]} is ambiguous ({failures[0][1]})")
    listed = {}
    if captions is not None:
        rows, _ = list_clips(folder, captions, _KINDS)
        listed = {clip.path: clip for clip in rows}
    sounds, texts = {}, {}
    for clip in found:
        row = listed.get(clip.path)
        key = pairing_key(clip.id) if row is None else output_name(row.id)
        if key in sounds:
            raise EvaluateError(f"{folder}: {sounds[key]} and {clip.path} name one clip")
        sounds[key] = clip.path
        if row is not None:
            texts[key] = row.caption
    return sounds, texts


def pair_sounds(
    pred: dict[str, Path], truth: dict[str, Path], allow_unpaired: bool
) -> tuple[list[tuple[str, Path, Path]], dict[str, list[str]]]:
    """[(key, file of pred, file of truth)], and {side: the keys that it alone has}.

    Raises:
      EvaluateError: clips without a partner, unless they are allowed; fewer than two pairs.
    """
    lacking = {
        "pred": sorted(pred.keys() - truth.keys()),
        "truth": sorted(truth.keys() - pred.keys()),
    }
    lacking = {side: clips for side, clips in lacking.items() if clips}
    if lacking and not allow_unpaired:
        shown = "; ".join(
            f"{len(clips)} only in {side}: {list_few(clips)}" for side, clips in lacking.items()
        )
        raise EvaluateError(
            f"pred and truth do not pair: {shown}; --allow_unpaired scores those that do"
        )
    pairs = [(key, path, truth[key]) for key, path in pred.items() if key in truth]
    if len(pairs) < 2:
        raise EvaluateError(
            f"pred and truth have {len(pairs)} clips in common: at least 2 are needed"
        )
    return pairs, lacking


def read_pair(pred: Path, truth: Path, duration: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Two sounds of a clip at 16 kHz, mono, of equal length: their first `duration` seconds.

    The generated sound is read as the network made it, before the limiter, where that was kept.

    Raises:
      MediaError: a file is unreadable, not finite, or shorter than `duration`.
      EvaluateError: without a duration, the lengths differ by more than 0.1 s.
    """
    samples = round(duration * SAMPLE_RATE) or None
    paths = find_as_made(pred), truth
    sounds = [read_audio(path, SAMPLE_RATE, samples, duration) for path in paths]
    lengths = [len(sound) for sound in sounds]
    if abs(lengths[0] - lengths[1]) > _APART * SAMPLE_RATE:
        raise EvaluateError(
            f"{pred}: {lengths[0] / SAMPLE_RATE:.2f} s, the true sound {truth} has "
            f"{lengths[1] / SAMPLE_RATE:.2f} s: give --duration to compare as much from the start"
        )
    return tuple(sound[: min(lengths)] for sound in sounds)


def evaluate_sounds(
    pred, truth, captions=None, duration: float = 0.0, allow_unpaired: bool = False
) -> dict[str, dict]:
    """Our own metrics of two folders of sounds (or videos with sound), paired by file name.

    Args:
      pred, truth: folders; sounds are mixed down to mono and resampled to 16 kHz.
      captions: TSV with the columns id and caption, or None: no caption accuracy.
      duration: seconds compared, from the start; 0: whole sounds, which must have equal lengths.
      allow_unpaired: score the clips that pair and can be read, and report the others.

    Returns:
      As `evaluate_caches`, and "failed": {clip: reason} of the clips that could not be compared.
      See `SoundMetrics` and `caption_accuracy` for the metrics.

    Raises:
      EvaluateError, MediaError, ListError: clips that do not pair, cannot be read, or differ in
        length.
    """
    (found, texts), (wanted, true_texts) = (sounds_by_key(side, captions) for side in (pred, truth))
    pairs, missing = pair_sounds(found, wanted, allow_unpaired)
    texts = true_texts | texts  # a list may name the files of either side
    lacking = [key for key, *_ in pairs if key not in texts]
    if captions is not None and lacking:
        raise EvaluateError(f"{captions}: no row for {len(lacking)} clips: {list_few(lacking)}")
    measured, heard, failed = SoundMetrics(SAMPLE_RATE), [], {}
    for key, one, other in tqdm(pairs, desc="Comparing", unit="clip"):
        try:
            sounds = read_pair(one, other, duration)
            measured.add(key, *sounds)
        except Exception as error:
            if not allow_unpaired:
                raise
            failed[key] = describe(error)
            continue
        if texts:
            heard.append((*sounds, texts[key]))
    if len(measured.clips) < 2:
        reason = next(iter(failed.values()))
        raise EvaluateError(f"fewer than 2 clips can be compared, the first reason: {reason}")
    values, clips, left_out = measured.values(), measured.counts(), {}
    if texts:
        _add_caption_accuracy(heard, values, clips, left_out)
    else:
        left_out["caption_accuracy"] = "needs --captions"
    for name, value in list(values.items()):
        if not math.isfinite(value):
            left_out[name] = "nothing to count"
            del values[name]
    return {
        "metrics": values,
        "clips": clips,
        "truth_clips": clips,
        "missing": {"sounds": missing} if missing else {},
        "left_out": left_out,
        "failed": failed,
        "notes": _notes(pairs, measured),
    }


def _add_caption_accuracy(heard: list, values: dict, clips: dict, left_out: dict) -> None:
    try:
        accuracy = metrics.caption_accuracy(*zip(*heard), SAMPLE_RATE)
    except ValueError as error:
        left_out["caption_accuracy"] = str(error)
        return
    for key in ("accuracy", "true_accuracy", "chance"):
        values[f"caption_{key}"] = accuracy[key]
        clips[f"caption_{key}"] = accuracy["clips"]


def _notes(pairs: list[tuple[str, Path, Path]], measured: SoundMetrics) -> list[str]:
    """What the reader of the metrics should know."""
    first = next(pair for pair in pairs if pair[0] in measured.clips)
    rates = {stored_sample_rate(path) for path in first[1:]}
    notes = [f"compared at {SAMPLE_RATE} Hz"] if rates != {SAMPLE_RATE} else []
    silent = len(measured.clips) - measured.counts()["spectral_convergence"]
    if silent:
        notes.append(f"{silent} true sounds are digital silence: no spectral convergence for them")
    return notes

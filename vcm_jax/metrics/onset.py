"""Synchrony, from waveforms: onsets of sounds, and how well they agree with the true ones."""

from collections.abc import Sequence

import librosa
import numpy as np

# The detector's settings were tuned on 200 true sounds of the training split of Impacts (seed 0)
# and on their log-mel round trip. The floor is fixed, not relative to the clip's loudest moment, so
# that what counts as an onset does not depend on the rest of the clip.
_WINDOW, _HOP, _BANDS = 0.032, 0.008, 40  # seconds, seconds, mel bands
_FLOOR = 1e-4  # mel power
_PEAK = dict(pre_max=3, post_max=3, pre_avg=12, post_avg=12, delta=0.9, wait=6)  # frames; dB
_BIAS = -0.0038  # seconds: median of (detected - true) on those 200 true sounds


def merge_close(times: np.ndarray, gap: float = 0.06) -> np.ndarray:
    """Sorted times (n,), without those less than `gap` seconds after the last one that is kept."""
    kept = []
    for time in np.sort(times):
        if not kept or time - kept[-1] >= gap:
            kept.append(time)
    return np.array(kept, float)


def detect_onsets(audio: np.ndarray, sample_rate: int) -> np.ndarray:
    """Times (n,) in seconds, ascending, at which something begins to sound.

    They are the peaks (librosa.onset) of the rise in level from frame to frame (every 8 ms), in
    decibels above a fixed floor, averaged over 40 mel bands. The detector's median bias is
    subtracted.

    Args:
      audio: (samples,) floating point.
      sample_rate: Hz, at least 16000.

    Raises:
      ValueError: the audio is not one-dimensional, not finite, or under 32 ms long.
    """
    window, hop = round(_WINDOW * sample_rate), round(_HOP * sample_rate)
    audio = np.asarray(audio)
    if audio.ndim != 1 or len(audio) < window or not np.isfinite(audio).all():
        raise ValueError(
            f"onsets need finite sound (samples,) of at least {window} samples, got {audio.shape}"
        )
    power = librosa.feature.melspectrogram(
        y=audio.astype(np.float32),
        sr=sample_rate,
        n_fft=window,
        hop_length=hop,
        n_mels=_BANDS,
        fmax=8000,
        center=True,
        pad_mode="constant",
    )
    level = 10 * np.log10(np.maximum(power, _FLOOR))
    rise = librosa.onset.onset_strength(S=level, sr=sample_rate, hop_length=hop, center=False)
    frames = librosa.onset.onset_detect(onset_envelope=rise, normalize=False, **_PEAK)
    return np.maximum(frames * hop / sample_rate - _BIAS, 0)


def _matches(predicted: np.ndarray, truth: np.ndarray, tolerance: float) -> list[float]:
    """Errors (predicted - truth) of a largest one-to-one matching within the tolerance.

    Both are in ascending order. Taking the earliest pair that fits is then optimal: a time that is
    too early for the first remaining partner is too early for all later ones.
    """
    errors, i, j = [], 0, 0
    while i < len(predicted) and j < len(truth):
        error = predicted[i] - truth[j]
        if abs(error) <= tolerance:
            errors.append(error)
        i, j = i + (error <= tolerance), j + (error >= -tolerance)
    return errors


def count_onsets(predicted: np.ndarray, truth: np.ndarray, tolerance: float = 0.05) -> np.ndarray:
    """A clip's counts for `onset_scores`: [matched, predicted, true, sum of |error| in seconds].

    Args:
      predicted, truth: times in seconds, in any order.
      tolerance: seconds.

    Returns:
      (4,) float64; `scores_of_counts` computes the metrics from their sum over clips.
    """
    errors = _matches(np.sort(predicted), np.sort(truth), tolerance)
    return np.array([len(errors), len(predicted), len(truth), np.sum(np.abs(errors))], float)


def scores_of_counts(counts: np.ndarray) -> dict[str, float]:
    """precision, recall, f1, timing_error_ms of counts (4,), as `onset_scores` explains them."""
    matched, predicted, true, error = counts
    return {
        "precision": float(matched / max(predicted, 1)),
        "recall": float(matched / max(true, 1)),
        "f1": float(2 * matched / max(predicted + true, 1)),
        "timing_error_ms": float(1000 * error / matched) if matched else float("nan"),
    }


def onset_scores(
    predicted: Sequence[np.ndarray], truth: Sequence[np.ndarray], tolerance: float = 0.05
) -> dict[str, float]:
    """How well detected onsets agree with the true times, counted over all clips together.

    Args:
      predicted, truth: for each clip an array of times in seconds, in any order. Apply
        `merge_close` first, since the detector cannot tell apart onsets that are closer.
      tolerance: seconds.

    Returns:
      precision, recall and f1 of a largest one-to-one matching (0 where nothing can be counted),
      and timing_error_ms, the mean absolute error of the matched pairs (NaN if there are none).

    Raises:
      ValueError: the numbers of clips differ.
    """
    if len(predicted) != len(truth):
        raise ValueError(f"{len(predicted)} predicted clips, but {len(truth)} true ones")
    counts = [count_onsets(one, other, tolerance) for one, other in zip(predicted, truth)]
    return scores_of_counts(np.sum(counts, axis=0) if counts else np.zeros(4))

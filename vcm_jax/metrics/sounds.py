"""Metrics of a set of sounds against the true ones, from waveforms alone: ours, not the papers'.

One pass over the clips keeps what each clip contributes to every metric. The metrics of any
resampling of the clips (for bootstrap intervals) then take no second pass over the sounds.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from vcm_jax.metrics.frechet import RunningGaussian, frechet_distance, log_mel_features
from vcm_jax.metrics.loudness import loudness, spectral_convergence
from vcm_jax.metrics.onset import count_onsets, detect_onsets, merge_close, scores_of_counts


class Metric(NamedTuple):
    """How a metric is shown: its label, the format of its value, and whether less is better."""

    label: str
    format: str
    less_is_better: bool


METRICS = {
    "onset_f1": Metric("onset F1", ".3f", False),
    "onset_timing_error_ms": Metric("timing error, ms", ".1f", True),
    "log_mel_fd": Metric("log-mel FD", ".3f", True),
    "spectral_convergence": Metric("spectral convergence", ".3f", True),
    "loudness_error_db": Metric("loudness error, dB", ".2f", True),
}
_CENTRE = -3.0  # log10 power, near the mean of log-mel features: sums about it lose few digits


def _moments(rows: np.ndarray) -> np.ndarray:
    """Flat sums over rows (n, d), about a fixed centre: n, sum, sum of outer products."""
    rows = np.asarray(rows, np.float64) - _CENTRE
    return np.concatenate([[len(rows)], rows.sum(0), (rows.T @ rows).ravel()])


def _gaussian(moments: np.ndarray, width: int) -> RunningGaussian:
    gaussian = RunningGaussian()
    total, sums = moments[0], moments[1 : 1 + width]
    gaussian.count, gaussian.mean = total, sums / total
    gaussian.scatter = moments[1 + width :].reshape(width, width) - np.outer(sums, sums) / total
    return gaussian


class SoundMetrics:
    """What every clip contributes to the metrics, collected clip by clip.

    Attributes:
      clips: ids, in the order in which they were added.
      per_clip: name -> one number per clip, in that order: onset_f1, spectral_convergence (NaN
        where the true sound is silent), loudness_error_db, and log_mel_error, the root mean square
        difference of log-mel frames in dB.
    """

    def __init__(self, sample_rate: int):
        """sample_rate: Hz, of all sounds, at least 16000."""
        self.sample_rate = sample_rate
        self.clips: list[str] = []
        self.per_clip: dict[str, list[float]] = {}
        self._counts, self._pred, self._truth = [], [], []

    def add(self, clip: str, pred: np.ndarray, truth: np.ndarray) -> None:
        """Adds a clip's sounds, (samples,) each and of equal length, at least 64 ms.

        Raises:
          ValueError: other shapes, or values that are not finite; the message names the clip, which
            is then not added.
        """
        rate = self.sample_rate
        try:
            if np.shape(pred) != np.shape(truth):
                raise ValueError(f"{np.shape(pred)} samples, the true sound has {np.shape(truth)}")
            level = loudness(pred, rate) - loudness(truth, rate)
            found, wanted = (log_mel_features(sound, rate) for sound in (pred, truth))
            counts = count_onsets(
                *(merge_close(detect_onsets(sound, rate)) for sound in (pred, truth))
            )
            silent = not np.any(truth)
            convergence = np.nan if silent else spectral_convergence(pred, truth, rate)
        except ValueError as error:
            raise ValueError(f"{clip}: {error}") from None
        self.clips.append(clip)
        self._counts.append(counts)
        self._pred.append(_moments(found))
        self._truth.append(_moments(wanted))
        self._width = found.shape[1]
        for name, value in {
            "onset_f1": scores_of_counts(counts)["f1"] if counts[1:3].any() else 1.0,
            "spectral_convergence": convergence,
            "loudness_error_db": abs(level),
            "log_mel_error": 10 * np.sqrt(np.mean((found - wanted) ** 2)),
        }.items():
            self.per_clip.setdefault(name, []).append(float(value))

    def extend(self, other: "SoundMetrics") -> None:
        """Adds the clips of another, of the same sample rate."""
        self.clips += other.clips
        self._counts += other._counts
        self._pred += other._pred
        self._truth += other._truth
        self._width = other._width
        for name, values in other.per_clip.items():
            self.per_clip.setdefault(name, []).extend(values)

    def values(self, weights: np.ndarray | None = None) -> dict[str, float]:
        """The metrics over all clips, by the names of METRICS.

        Onsets are counted over all clips together (`onset_scores`; 50 ms), detected in both
        sounds; log_mel_fd is the Frechet distance of single log-mel frames; the others are means
        over clips.

        Args:
          weights: (clips,), how often each clip counts; None: once.

        Raises:
          ValueError: there are no clips.
        """
        if not self.clips:
            raise ValueError("no clips: there is nothing to measure")
        weights = np.ones(len(self.clips)) if weights is None else np.asarray(weights, float)
        onsets = scores_of_counts(weights @ np.stack(self._counts))
        gaussians = [
            _gaussian(weights @ np.stack(moments), self._width)
            for moments in (self._pred, self._truth)
        ]
        return {
            "onset_f1": onsets["f1"],
            "onset_timing_error_ms": onsets["timing_error_ms"],
            "log_mel_fd": frechet_distance(*gaussians),
            "spectral_convergence": self._mean("spectral_convergence", weights),
            "loudness_error_db": self._mean("loudness_error_db", weights),
        }

    def _mean(self, name: str, weights: np.ndarray) -> float:
        """The weighted mean over the clips that have a value; NaN without any."""
        values = np.array(self.per_clip[name])
        there = np.isfinite(values)
        total = weights[there].sum()
        return float(weights[there] @ values[there] / total) if total else float("nan")

    def counts(self) -> dict[str, int]:
        """The number of clips that each metric rests on."""
        audible = int(np.isfinite(self.per_clip["spectral_convergence"]).sum())
        return {name: len(self.clips) for name in METRICS} | {"spectral_convergence": audible}


def bootstrap(
    sets: Mapping[str, SoundMetrics], draws: int = 1000, seed: int = 0
) -> dict[str, dict[str, np.ndarray]]:
    """Metrics of resampled clips: set -> metric -> (draws,); all sets see the same draws.

    Confidence intervals are percentiles of these values. Intervals of the difference between two
    sets are percentiles of the differences, in which the difficulty of a clip cancels (Efron and
    Tibshirani 1993). They reflect the choice of clips, not the noise or the training run.

    Args:
      sets: over the same clips in the same order.
      draws: how often all clips are resampled.
      seed: any integer.

    Raises:
      ValueError: the clips differ.
    """
    clips = {tuple(metrics.clips) for metrics in sets.values()}
    if len(clips) != 1:
        raise ValueError("the sets must have the same clips in the same order")
    size = len(next(iter(clips)))
    rng = np.random.default_rng(seed % 2**64)
    weights = rng.multinomial(size, np.full(size, 1 / size), draws)
    found = {}
    for name, metrics in sets.items():
        rows = [metrics.values(row) for row in weights]
        found[name] = {key: np.array([row[key] for row in rows]) for key in METRICS}
    return found

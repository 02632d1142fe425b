"""Levels of what people listen to: a true-peak limiter, and loudness in LUFS.

A codec's sounds may exceed full scale, and so does the curve between samples that a converter
plays. Both would be clipped, which is heard as crackle.
"""

from collections.abc import Iterator

import numpy as np
import pyloudnorm
from scipy import ndimage, signal

PEAK = -1.0  # dBTP, the ceiling that EBU R 128 recommends

_OVERSAMPLING = 8
_BLOCK, _CONTEXT = 2**17, 16  # samples; the interpolation reads 10 on either side
_MARGIN = 0.1  # dB, for what `_peaks` misses: less than 0.1 below 0.9 of the Nyquist frequency
_ATTACK = 0.005  # s: the gain falls so long before a peak
_RELEASE = 0.08  # s: after it the reduction decays, by a factor e each


def decibels(ratio) -> np.ndarray:
    """20 log10 of amplitudes; -inf for 0."""
    with np.errstate(divide="ignore"):
        return 20 * np.log10(ratio)


def _blocks(count: int) -> Iterator[slice]:
    """Consecutive parts of a sound: the memory of what is computed of each does not grow."""
    return (slice(start, min(start + _BLOCK, count)) for start in range(0, count, _BLOCK))


def _peaks(sound: np.ndarray, part: slice) -> np.ndarray:
    """The largest absolute value in the interval from each sample of a part to the next."""
    first = max(0, part.start - _CONTEXT)
    around = np.asarray(sound[first : part.stop + _CONTEXT], np.float64)
    curve = np.abs(signal.resample_poly(around, _OVERSAMPLING, 1))
    inside = slice(part.start - first, part.stop - first)
    return np.maximum(curve.reshape(-1, _OVERSAMPLING).max(axis=1), np.abs(around))[inside]


def true_peak(sound: np.ndarray) -> float:
    """Largest absolute value of the curve through the samples in dBTP (ITU-R BS.1770-4, annex 2).

    The curve is sampled 8 times as often as the sound (samples,).
    """
    sound = np.asarray(sound)
    highest = max((_peaks(sound, part).max() for part in _blocks(len(sound))), default=0)
    return float(decibels(highest))


def _check(sound: np.ndarray) -> None:
    if np.ndim(sound) != 1 or not np.isfinite(sound).all():
        raise ValueError(f"a sound must be finite and (samples,), not {np.shape(sound)}")


def limit(sound: np.ndarray, sample_rate: int) -> tuple[np.ndarray, float]:
    """A mono sound whose true peak is at most -1 dBTP, and the largest reduction in dB.

    A sound below the ceiling is returned as it is. Otherwise the gain falls within 5 ms before each
    peak that is too high, and returns exponentially with a time constant of 80 ms.

    Args:
      sound: (samples,) float.
      sample_rate: Hz.

    Raises:
      ValueError: another shape, or values that are not finite.
    """
    _check(sound)
    audio = np.asarray(sound)
    needed = _needed(audio, sample_rate)
    if not needed.any():
        return sound, 0.0
    ahead = max(1, round(_ATTACK * sample_rate))
    limited, most = np.empty(len(audio), np.float32), 0.0
    for part in _blocks(len(audio)):
        around = needed[max(0, part.start - ahead) : part.stop + ahead]
        missing = max(0, ahead - part.start), max(0, part.stop + ahead - len(audio))
        reduction = _smooth(np.pad(around, missing), ahead)
        limited[part] = audio[part] * 10 ** (-reduction / 20)
        most = max(most, float(reduction.max()))
    # A gain that varies moves the peaks between samples a little.
    rest = max(0.0, true_peak(limited) - (PEAK - _MARGIN))
    limited *= np.float32(10 ** (-rest / 20))
    return limited, most + rest


def _needed(sound: np.ndarray, sample_rate: int) -> np.ndarray:
    """The reduction in dB that each sample needs for itself and what came before: (samples,)."""
    needed, last = np.empty(len(sound), np.float32), 0.0
    for part in _blocks(len(sound)):
        excess = np.maximum(decibels(_peaks(sound, part)) - (PEAK - _MARGIN), 0)
        # The largest of all past excesses, each decayed, is a running maximum in the log domain.
        decay = np.arange(1, len(excess) + 1) / (_RELEASE * sample_rate)
        with np.errstate(divide="ignore"):
            logs = np.log(np.append(last, excess)) + np.append(0, decay)
            needed[part] = np.exp(np.maximum.accumulate(logs)[1:] - decay)
        last = needed[part][-1]
    return needed


def _smooth(needed: np.ndarray, ahead: int) -> np.ndarray:
    """A mean of values none of which is less than what is needed: (ahead + n + ahead) -> (n,)."""
    highest = ndimage.maximum_filter1d(needed, ahead + 1)[(ahead + 1) // 2 :]
    weights = signal.windows.hann(ahead + 3)[1:-1]
    return signal.oaconvolve(highest[: len(needed) - ahead], weights / weights.sum(), "valid")


def at_loudness(sound: np.ndarray, sample_rate: int, lufs: float) -> np.ndarray:
    """A sound (samples,) scaled to an integrated loudness (ITU-R BS.1770-4, mono) in LUFS.

    Raises:
      ValueError: the sound is silent or too short to have a loudness, or as `limit`.
    """
    _check(sound)
    audio, meter = np.asarray(sound, np.float64), pyloudnorm.Meter(sample_rate)
    if len(audio) < meter.block_size * sample_rate:
        seconds = len(audio) / sample_rate
        raise ValueError(f"{seconds:.2g} s of sound have no loudness in LUFS: it takes 0.4 s")
    found = meter.integrated_loudness(audio)
    if not np.isfinite(found):
        raise ValueError("silence has no loudness in LUFS: nothing in the sound reaches -70 LUFS")
    return (audio * 10 ** ((lufs - found) / 20)).astype(np.float32)

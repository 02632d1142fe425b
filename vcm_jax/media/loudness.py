"""Levels of what people listen to: a true-peak limiter, and loudness in LUFS.

A codec's sounds may exceed full scale, and so does the curve between samples that a converter
plays. Both would be clipped, which is heard as crackle.
"""

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


def _peaks(sound: np.ndarray) -> np.ndarray:
    """The largest absolute value in the interval from each sample to the next, (samples,)."""
    peaks = np.abs(sound)
    for start in range(0, len(sound), _BLOCK):  # the memory of the curve does not grow
        first, end = max(0, start - _CONTEXT), min(start + _BLOCK, len(sound))
        curve = np.abs(signal.resample_poly(sound[first : end + _CONTEXT], _OVERSAMPLING, 1))
        found = curve.reshape(-1, _OVERSAMPLING).max(axis=1)[start - first : end - first]
        peaks[start:end] = np.maximum(peaks[start:end], found)
    return peaks


def true_peak(sound: np.ndarray) -> float:
    """Largest absolute value of the curve through the samples in dBTP (ITU-R BS.1770-4, annex 2).

    The curve is sampled 8 times as often as the sound (samples,).
    """
    return float(decibels(_peaks(np.asarray(sound, np.float64)).max(initial=0)))


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
    audio = np.asarray(sound, np.float64)
    if not len(audio):
        return sound, 0.0
    excess = decibels(_peaks(audio)) - (PEAK - _MARGIN)
    if not (excess > 0).any():
        return sound, 0.0
    # The largest of all past excesses, each decayed, is a running maximum in the log domain.
    decay = np.arange(len(audio)) / (_RELEASE * sample_rate)
    with np.errstate(divide="ignore"):
        needed = np.exp(np.maximum.accumulate(np.log(np.maximum(excess, 0)) + decay) - decay)
    # Each sample gets a mean of values none of which is less than its own.
    ahead = max(1, round(_ATTACK * sample_rate))
    padded = np.pad(needed, ahead)
    highest = ndimage.maximum_filter1d(padded, ahead + 1)[(ahead + 1) // 2 :]
    weights = signal.windows.hann(ahead + 3)[1:-1]
    reduction = signal.oaconvolve(highest[: len(audio) + ahead], weights / weights.sum(), "valid")
    limited = audio * 10 ** (-reduction / 20)
    # A gain that varies moves the peaks between samples a little.
    rest = max(0.0, true_peak(limited) - (PEAK - _MARGIN))
    limited *= 10 ** (-rest / 20)
    return limited.astype(np.float32), float(reduction.max() + rest)


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

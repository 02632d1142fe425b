"""How loud a sound is, and how far its spectrogram is from another's: this project's own metrics.

Unlike scores from pretrained networks, these need the waveforms alone. They compare a clip with its
own true sound: of two sounds that fit the picture equally well they prefer the recorded one.
"""

import librosa
import numpy as np

_WINDOW, _HOP = 0.064, 0.016  # seconds
QUIETEST = -70.0  # dB: quieter sounds get this level


def _magnitudes(audio: np.ndarray, sample_rate: int) -> np.ndarray:
    """|STFT| (bins, frames) of whole 64 ms Hann windows, one every 16 ms."""
    window, hop = round(_WINDOW * sample_rate), round(_HOP * sample_rate)
    audio = np.asarray(audio, np.float32)
    if audio.ndim != 1 or len(audio) < window or not np.isfinite(audio).all():
        raise ValueError(
            f"sound must be finite, (samples,), at least {window} of them, got {audio.shape}"
        )
    return np.abs(librosa.stft(audio, n_fft=window, hop_length=hop, center=False))


def loudness(audio: np.ndarray, sample_rate: int) -> float:
    """A-weighted level of a whole clip in dB: 0 for a sine of amplitude 1 at 1 kHz, at least -70.

    It is the power, averaged over time and summed over frequency with the weights of the A curve
    of IEC 61672. It is not LUFS: pauses count.

    Args:
      audio: (samples,).
      sample_rate: Hz.

    Raises:
      ValueError: another shape, under 64 ms of sound, or values that are not finite.
    """
    magnitudes = _magnitudes(audio, sample_rate)
    window = round(_WINDOW * sample_rate)
    frequencies = librosa.fft_frequencies(sr=sample_rate, n_fft=window)
    frequencies[0] = 1.0  # the curve has no value at 0 Hz; at 1 Hz it is -148 dB
    weights = 10 ** (librosa.A_weighting(frequencies, min_db=None) / 10)
    # For a full-scale sine, |STFT|^2 sums up to sum(w^2) n / 4 over the bins.
    hann = librosa.filters.get_window("hann", window)
    power = np.mean(np.sum(weights[:, None] * magnitudes.astype(np.float64) ** 2, axis=0))
    power /= np.sum(hann**2) * window / 4
    return max(10 * float(np.log10(power + 1e-30)), QUIETEST)


def spectral_convergence(pred: np.ndarray, truth: np.ndarray, sample_rate: int) -> float:
    """|| |STFT pred| - |STFT truth| || / || |STFT truth| || (Frobenius; Arik et al. 2018).

    0 is a perfect match; silence scores 1. Windows last 64 ms and start every 16 ms.

    Args:
      pred, truth: (samples,) of equal length.
      sample_rate: Hz.

    Raises:
      ValueError: the lengths differ, the truth is silent, and as `loudness`.
    """
    if np.shape(pred) != np.shape(truth):
        raise ValueError(f"lengths differ: pred {np.shape(pred)}, truth {np.shape(truth)}")
    found, wanted = (_magnitudes(audio, sample_rate) for audio in (pred, truth))
    norm = np.linalg.norm(wanted)
    if not norm:
        raise ValueError("the true sound is digital silence: there is no spectrum to compare with")
    return float(np.linalg.norm(found - wanted) / norm)

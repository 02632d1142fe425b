"""Frechet distance between two sets of feature rows, and weights-free features for it."""

import librosa
import numpy as np

_WINDOW, _HOP, _BANDS = 0.064, 0.016, 40  # seconds, seconds, mel bands
_FLOOR = 1e-5  # mel power: about the level of the quietest background of Impacts


def frechet_distance(pred: np.ndarray, truth: np.ndarray) -> float:
    """Squared Frechet (2-Wasserstein) distance between Gaussians fitted to rows (n, d), (m, d).

    |mean_p - mean_t|^2 + tr S_p + tr S_t - 2 tr (S_p S_t)^(1/2), S with n - 1, as in the FID
    (Heusel et al. 2017, eq. 6). With centred rows X / sqrt(n - 1), Y / sqrt(m - 1) the last trace
    is the sum of the singular values of X Y^T, and so of R_x R_y^T with the QR factors: stable
    also for fewer rows than columns, where a matrix square root is not. All in float64.

    Raises: ValueError for arrays that are not (n, d) with the same d and n >= 2, or not finite.
    """
    arrays = {"pred": np.asarray(pred, np.float64), "truth": np.asarray(truth, np.float64)}
    for name, rows in arrays.items():
        if rows.ndim != 2 or len(rows) < 2:
            raise ValueError(f"{name} must be (n, d) with n >= 2, got {rows.shape}")
        if not np.isfinite(rows).all():
            bad = np.sum(~np.isfinite(rows))
            raise ValueError(f"{name} holds {bad} values that are not finite, in {rows.shape}")
    if arrays["pred"].shape[1] != arrays["truth"].shape[1]:
        raise ValueError(f"widths differ: pred {np.shape(pred)}, truth {np.shape(truth)}")
    means = [rows.mean(0) for rows in arrays.values()]
    factors = [
        np.linalg.qr((rows - mean) / np.sqrt(len(rows) - 1), mode="r")
        for rows, mean in zip(arrays.values(), means)
    ]
    cross = np.linalg.svd(factors[0] @ factors[1].T, compute_uv=False).sum()
    traces = sum(np.sum(factor**2) for factor in factors)
    return float(np.sum((means[0] - means[1]) ** 2) + traces - 2 * cross)


def log_mel_features(audio: np.ndarray, sample_rate: int) -> np.ndarray:
    """Rows (frames, 40) for a Frechet distance on spectra: log10 of the mel power.

    Frames of 64 ms (Hann), one every 16 ms, only whole ones (n_fft 1024, hop 256 at 16 kHz, the
    least sample rate); 40 Slaney mel bands from 0 to 8 kHz with area normalisation; power below
    1e-5 counts as 1e-5. A row is a single frame: the distance compares which spectra occur, not
    when.

    Raises: ValueError if the audio is not (samples,) or shorter than a frame.
    """
    window, hop = round(_WINDOW * sample_rate), round(_HOP * sample_rate)
    audio = np.asarray(audio, np.float32)
    if audio.ndim != 1 or len(audio) < window:
        raise ValueError(f"audio must be (samples,), at least {window} of them, got {audio.shape}")
    power = librosa.feature.melspectrogram(
        y=audio,
        sr=sample_rate,
        n_fft=window,
        hop_length=hop,
        n_mels=_BANDS,
        fmax=8000,
        center=False,
    )
    return np.log10(np.maximum(power, _FLOOR)).T


def spectral_sharpness(rows: np.ndarray) -> float:
    """Mean |second difference| along the bands of log-mel rows (n, d), over their louder half.

    Sharp partials give a high figure, blurred spectra a low one: compare with that of true sound.
    """
    level = rows.mean(1)
    louder = rows[level >= np.median(level)]
    return float(np.mean(np.abs(np.diff(louder, n=2, axis=1))))

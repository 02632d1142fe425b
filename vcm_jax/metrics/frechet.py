"""Frechet distance between two sets of feature rows, and weights-free features for it."""

import librosa
import numpy as np

_WINDOW, _HOP, _BANDS = 0.064, 0.016, 40  # seconds, seconds, mel bands
_FLOOR = 1e-5  # mel power: about the level of the quietest background of Impacts


class RunningGaussian:
    """Mean and covariance of feature rows that arrive in batches, in float64.

    Batches are merged by the method of Chan, Golub and LeVeque (1983): neither their sizes nor a
    large mean cost accuracy. The memory needed is that of one (d, d) matrix.

    Attributes:
      count: number of rows so far.
      mean: (d,).
      scatter: (d, d), the sum of outer products of the centred rows.
    """

    def __init__(self):
        self.count, self.mean, self.scatter = 0, None, None

    def update(self, rows: np.ndarray) -> "RunningGaussian":
        """Adds rows (n, d), n >= 1; returns itself.

        Raises:
          ValueError: another shape or width, or values that are not finite.
        """
        rows = _checked("rows", rows, least=1)
        count, mean = len(rows), rows.mean(0)
        centred = rows - mean
        scatter = centred.T @ centred
        if self.count == 0:
            self.count, self.mean, self.scatter = count, mean, scatter
            return self
        if mean.shape != self.mean.shape:
            raise ValueError(f"rows of width {len(mean)} after rows of width {len(self.mean)}")
        step, total = mean - self.mean, self.count + count
        self.scatter += scatter + np.outer(step, step) * (self.count * count / total)
        self.mean = self.mean + step * (count / total)
        self.count = total
        return self

    def without(self, other: "RunningGaussian") -> "RunningGaussian":
        """The Gaussian of the rows that are not among those of `other`, which were added before.

        Raises:
          ValueError: no row is left.
        """
        left = RunningGaussian()
        left.count = self.count - other.count
        if left.count < 1:
            raise ValueError(f"{self.count} rows without {other.count} of them leave none")
        left.mean = self.mean + (self.mean - other.mean) * (other.count / left.count)
        step = other.mean - left.mean
        between = np.outer(step, step) * (left.count * other.count / self.count)
        left.scatter = self.scatter - other.scatter - between
        return left

    @property
    def covariance(self) -> np.ndarray:
        """(d, d), normalised by n - 1."""
        return self.scatter / (self.count - 1)


def _checked(name: str, rows: np.ndarray, least: int) -> np.ndarray:
    rows = np.asarray(rows, np.float64)
    if rows.ndim != 2 or len(rows) < least:
        raise ValueError(f"{name} must be (n, d) with n >= {least}, got {rows.shape}")
    if not np.isfinite(rows).all():
        bad = np.sum(~np.isfinite(rows))
        raise ValueError(f"{name} holds {bad} values that are not finite, in {rows.shape}")
    return rows


def _fitted(name: str, rows) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Mean (d,), a root R (n, d) and the covariance (d, d); one of the last two is None.

    R^T R is the covariance. Up to d rows give a root, more rows a covariance.
    """
    if not isinstance(rows, RunningGaussian):
        rows = _checked(name, rows, least=2)
        if len(rows) <= rows.shape[1]:
            mean = rows.mean(0)
            return mean, (rows - mean) / np.sqrt(len(rows) - 1), None
        rows = RunningGaussian().update(rows)
    if rows.count < 2:
        raise ValueError(f"{name} must have at least 2 rows, it has {rows.count}")
    return rows.mean, None, rows.covariance


def _root(covariance: np.ndarray) -> np.ndarray:
    """R (r, d) with R^T R the covariance, from its eigenvalues."""
    values, vectors = np.linalg.eigh(covariance)
    there = values > 0  # rounding leaves the others at or slightly below zero
    return np.sqrt(values[there])[:, None] * vectors.T[there]


def frechet_distance(pred, truth) -> float:
    """Squared Frechet (2-Wasserstein) distance between Gaussians fitted to rows (n, d), (m, d).

    |mean_p - mean_t|^2 + tr S_p + tr S_t - 2 tr (S_p S_t)^(1/2), with covariances S normalised by
    n - 1, as in the FID (Heusel et al. 2017, eq. 6). With S = R^T R the last trace is the sum of
    the singular values of R_p R_t^T, or of the square roots of the eigenvalues of R_p S_t R_p^T.
    This is stable where a matrix square root is not, and about three times faster. R consists of
    the centred rows if there are at most as many rows as columns; otherwise it comes from the
    eigendecomposition of the covariance. Everything is computed in float64.

    Args:
      pred, truth: rows, or a `RunningGaussian` of them.

    Raises:
      ValueError: arrays that are not (n, d) with the same d and n >= 2, or not finite.
    """
    (mean_p, root_p, cov_p), (mean_t, root_t, cov_t) = (
        _fitted(name, rows) for name, rows in (("pred", pred), ("truth", truth))
    )
    if mean_p.shape != mean_t.shape:
        raise ValueError(f"widths differ: pred (n, {len(mean_p)}), truth (n, {len(mean_t)})")
    if root_p is not None and root_t is not None:
        cross = np.linalg.svd(root_p @ root_t.T, compute_uv=False).sum()
    else:
        root = next((root for root in (root_p, root_t) if root is not None), None)
        root = _root(cov_p) if root is None else root
        other = cov_p if root is root_t else cov_t
        values = np.linalg.eigvalsh(root @ other @ root.T)
        cross = np.sqrt(np.maximum(values, 0)).sum()
    traces = sum(
        np.sum(root**2) if root is not None else np.trace(covariance)
        for root, covariance in ((root_p, cov_p), (root_t, cov_t))
    )
    return float(np.sum((mean_p - mean_t) ** 2) + traces - 2 * cross)


def frechet_standard_error(clips, truth) -> float:
    """Standard error of the Frechet distance between the rows of all clips and `truth`.

    It says how far the distance would move with other clips, by leaving out one clip at a time: the
    jackknife, Efron and Tibshirani 1993, eq. 11.5.

    Args:
      clips: rows (n, d) of each clip, at least two.
      truth: as for `frechet_distance`.

    Raises:
      ValueError: fewer than two clips, or rows that `frechet_distance` refuses.
    """
    if len(clips) < 2:
        raise ValueError(f"a standard error needs at least 2 clips, got {len(clips)}")
    parts = [RunningGaussian().update(rows) for rows in clips]
    whole = RunningGaussian()
    for rows in clips:
        whole.update(rows)
    distances = np.array([frechet_distance(whole.without(part), truth) for part in parts])
    return float(np.sqrt((len(clips) - 1) * distances.var()))


def log_mel_features(audio: np.ndarray, sample_rate: int) -> np.ndarray:
    """Rows (frames, 40) for a Frechet distance between spectra: log10 of the mel power.

    Frames last 64 ms (Hann window) and start every 16 ms (n_fft 1024, hop 256 at 16 kHz, the
    lowest sample rate); only complete frames count. There are 40 Slaney mel bands from 0 to 8 kHz
    with area normalisation. Power is clipped at 1e-5 from below. A row is a single frame: the
    distance compares which spectra occur, not when.

    Raises:
      ValueError: the audio is not (samples,) or is shorter than a frame.
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
    """Mean |second difference| along the bands of log-mel rows (n, d), over the louder half.

    Sharp partials give a high value, blurred spectra a low one: compare it with that of true sound.
    """
    level = rows.mean(1)
    louder = rows[level >= np.median(level)]
    return float(np.mean(np.abs(np.diff(louder, n=2, axis=1))))

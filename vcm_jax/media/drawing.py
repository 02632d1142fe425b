"""Drawings of a clip over time: the picture's motion, the sound's waveform and mel spectrogram.

Every function draws on one axis of matplotlib's, whose x counts seconds.
"""

import numpy as np

from vcm_jax.media.read import read_frames
from vcm_jax.metrics import log_mel_features

FPS = 25  # at which motion is measured
_BLUE = "#4c78a8"


def reduced(frame: np.ndarray) -> np.ndarray:
    """A frame (H, W, 3) of at most about 200 rows, by leaving out rows and columns."""
    step = max(1, len(frame) // 100)
    return frame[::step, ::step]


def motion(path, duration: float | None = None) -> np.ndarray:
    """Mean change of a video's picture from frame to frame at FPS frames/s, (frames - 1,).

    Args:
      path: of the video.
      duration: seconds, from the start; None: all.

    Raises:
      MediaError: the video cannot be read, or is shorter.
    """
    before = None

    def change(frame: np.ndarray) -> np.float32:
        nonlocal before
        last, before = before, reduced(frame).astype(np.float32)
        return np.float32(0 if last is None else np.abs(before - last).mean())

    return read_frames(path, {FPS: change}, duration)[FPS][1:]


def draw_motion(axis, change: np.ndarray) -> None:
    """What `motion` gives, as an area."""
    axis.fill_between((np.arange(len(change)) + 1) / FPS, change, color=_BLUE, lw=0)
    axis.set_yticks([])


def draw_waveform(axis, sound: np.ndarray, sample_rate: int, columns: int = 1200) -> None:
    """The lowest and highest value of a sound (samples,) in each of some columns, as an area."""
    edges = np.linspace(0, len(sound), min(columns, len(sound)) + 1).astype(int)[:-1]
    low, high = (f.reduceat(sound, edges) for f in (np.minimum, np.maximum))
    axis.fill_between(edges / sample_rate, low, high, color=_BLUE, lw=0.3)
    peak = max(1e-3, np.abs(sound).max(initial=0))
    axis.set_ylim(-peak, peak)
    axis.set_yticks([])


def draw_mel(axis, sound: np.ndarray, sample_rate: int) -> None:
    """The log-mel spectrogram (10^-5 to 10^1.5 in power) of a sound (samples,)."""
    rows = log_mel_features(sound, sample_rate)
    axis.imshow(
        rows.T,
        origin="lower",
        aspect="auto",
        vmin=-5,
        vmax=1.5,
        cmap="magma",
        extent=(0, len(sound) / sample_rate, 0, rows.shape[1]),
    )
    axis.set_yticks([])

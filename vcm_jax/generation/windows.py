"""Clips longer than those of training: their latents are sampled in overlapping windows.

At every sampler step the network predicts the velocity in each window as in a clip of its own. The
predictions are averaged where windows overlap (as in MultiDiffusion, Bar-Tal et al. 2023), and the
whole clip takes the step, from one noise. The network's memory is that of a batch of windows, and
its time is proportional to the clip's length.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from vcm_jax import sampling
from vcm_jax.records.sequence import SequenceConfig

AUTO = 1.5  # training lengths: longer clips are sampled in windows
MAX_OVERLAP = 0.9


@dataclasses.dataclass(frozen=True)
class Windowing:
    """When and how long clips are divided into windows.

    Attributes:
      seconds: length of a window; clips that are longer are divided. None takes windows of the
        training length for clips longer than 1.5 times that; 0 never divides.
      overlap: the fraction of a window that it shares with the next one, at least.

    Raises:
      ValueError: when a setting is out of its range.
    """

    seconds: float | None = None
    overlap: float = 0.25

    def __post_init__(self):
        if self.seconds is not None and not 0 <= self.seconds < math.inf:
            raise ValueError(f"window must be 0 or more seconds, not {self.seconds}")
        if not 0 <= self.overlap <= MAX_OVERLAP:
            raise ValueError(f"window_overlap must be from 0 to {MAX_OVERLAP}, not {self.overlap}")

    def plan(self, training: SequenceConfig, seconds: float) -> "Windows | None":
        """The windows of a clip; None if it is sampled as a whole.

        Args:
          training: lengths of the clips of training.
          seconds: length of the clip.

        Raises:
          ValueError: windows are too short.
        """
        if self.seconds == 0:
            return None
        if self.seconds is None:
            if seconds <= AUTO * training.duration:
                return None
            window = training
        else:
            window = dataclasses.replace(training, duration=self.seconds)
        clip = dataclasses.replace(training, duration=seconds).latent_seq_len
        size = window.latent_seq_len
        if clip <= size:
            return None
        hop = max(1, size - math.ceil(round(size * self.overlap, 6)))
        count = -(-(clip - size) // hop) + 1
        starts = np.linspace(0, clip - size, count).round().astype(int)
        return Windows(window, clip, tuple(starts.tolist()))


@dataclasses.dataclass(frozen=True)
class Windows:
    """The windows of a clip.

    Attributes:
      sequence: lengths of a window.
      length: latents of the clip.
      starts: the first latent of each window. Windows are spread evenly; the last one ends with
        the clip.
    """

    sequence: SequenceConfig
    length: int
    starts: tuple[int, ...]

    @property
    def size(self) -> int:
        """Latents of a window."""
        return self.sequence.latent_seq_len

    @property
    def times(self) -> list[float]:
        """Seconds at which the windows start."""
        s = self.sequence
        return [start * s.hop * s.latent_downsample / s.sample_rate for start in self.starts]

    def weights(self) -> np.ndarray:
        """The weight of each window's prediction: float32 (windows, size).

        Raised cosines rise and fall over the whole overlap. The weights of all windows add up to 1
        at every latent.
        """
        place = (np.arange(self.size) + 0.5) / self.size
        bell = np.sin(np.pi * place) ** 2 + 1e-6  # the ends of the clip have one window alone
        total = np.zeros(self.length)
        for start in self.starts:
            total[start : start + self.size] += bell
        return np.stack([bell / total[a : a + self.size] for a in self.starts]).astype(np.float32)

    def cut(self, x: np.ndarray, indices) -> np.ndarray:
        """Latents (length, C) in some windows: (len(indices), size, C)."""
        return np.stack([x[self.starts[i] : self.starts[i] + self.size] for i in indices])


def sample_in_windows(
    velocity: Callable,
    windows: Windows,
    noise: np.ndarray,
    times,
    batch_size: int,
    *,
    restart: bool,
    noised: Callable,
    key: jax.Array,
    on_step: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """From noise to the sample at times[-1], (length, C) float32: `sampling.sample` in windows.

    Args:
      velocity: `velocity(x, indices, t, s)` -> (B, size, C): the average velocity in windows. x is
        (B, size, C), `indices` are their numbers, t and s are floats.
      windows: of the clip.
      noise: (length, C).
      times: as `sampling.sample`'s.
      batch_size: B. The last batch of windows is padded with copies of its last one.
      restart: whether the sampler is `sampling.restart_sample`.
      noised: the objective's (x0, x1, t) -> x_t, for that sampler.
      key: random key of that sampler's later noise.
      on_step: called before each step with the number of steps done and of all steps. What it
        raises ends the sampling.

    Raises:
      ValueError: as `sampling.sample`, or `sampling.restart_sample`.
    """
    weights, x = windows.weights(), np.asarray(noise, np.float32)
    count, jumps = len(windows.starts), sampling.intervals(times, restart)
    for step, (t, s) in enumerate(jumps):
        if on_step is not None:
            on_step(step, len(jumps))
        until = np.float32(0) if restart else s
        mean = np.zeros_like(x)
        for first in range(0, count, batch_size):
            indices = np.minimum(np.arange(first, first + batch_size), count - 1)
            found = np.asarray(velocity(windows.cut(x, indices), indices, t, until))
            for i, u in zip(range(first, min(first + batch_size, count)), found):
                start = windows.starts[i]
                mean[start : start + windows.size] += weights[i, :, None] * u
        x = x + (until - t) * mean
        if restart:
            fresh = sampling.fresh_noise(key, step, x.shape, x.dtype)
            x = np.asarray(noised(x[None], fresh[None], jnp.full(1, s, x.dtype))[0])
    return x

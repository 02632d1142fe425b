"""Sounds that the reference numbers of mel spectrograms and codecs were made from."""

import numpy as np

from vcm_jax.codec.mel import MEL_16K, MEL_44K

MODES = {"16k": (MEL_16K, 9000, 7000), "44k": (MEL_44K, 9100, 18_000)}


def chirp(config, seed: int, top: float, n: int) -> np.ndarray:
    """The reference numbers' input: a chirp with noise, clipped in places, silent in others."""
    time, seconds = np.arange(n) / config.sample_rate, n / config.sample_rate
    phase = 2 * np.pi * (100 * time + (top - 100) * time**2 / (2 * seconds))
    wave = 0.9 * np.sin(phase) + 0.1 * np.random.RandomState(seed).standard_normal(n)
    wave[int(0.2 * n) : int(0.3 * n)] = 0
    return wave.astype(np.float32)

"""Losses of a codec: a multi-resolution distance of sounds, and the energy distance.

All functions are pure and differentiable. Sounds are (B, samples).
"""

import functools

import jax
import jax.numpy as jnp
import librosa
import numpy as np

from vcm_jax.codec.mel import hann_window

# Samples per STFT frame at 16 kHz (hop a quarter of it), and the number of mel bands.
_RESOLUTIONS = ((2048, 96), (1024, 80), (512, 64), (256, 40))
_LINEAR = (2048, 512)  # resolutions whose linear magnitudes are compared, too
_BASE_RATE = 16_000
_QUIET = 0.1  # mean STFT magnitude; a full-scale tone has about 1


@functools.cache
def _filters(sample_rate: int, n_fft: int, bands: int) -> np.ndarray:
    """Slaney's mel filters (n_fft // 2 + 1, bands) float32."""
    return librosa.filters.mel(sr=sample_rate, n_fft=n_fft, n_mels=bands).T.astype(np.float32)


def _frame_factor(sample_rate: int) -> int:
    """How many times as long frames are as at 16 kHz: a power of 2 that keeps their seconds."""
    return 2 ** max(0, round(np.log2(sample_rate / _BASE_RATE)))


def stft_power(sound: jax.Array, n_fft: int) -> jax.Array:
    """Power of the STFT, `B T n_fft/2+1`, by frames that begin n_fft / 4 apart."""
    hop = n_fft // 4
    sound = jnp.pad(sound, ((0, 0), (n_fft // 2, n_fft // 2)))
    hops = sound[:, : sound.shape[1] // hop * hop].reshape(sound.shape[0], -1, hop)
    frames = jnp.concatenate([hops[:, i : hops.shape[1] - 3 + i] for i in range(4)], axis=-1)
    found = jnp.fft.rfft(frames * hann_window(n_fft)[None, None])
    return found.real**2 + found.imag**2


def analyse(sound: jax.Array, sample_rate: int) -> list[tuple[jax.Array, float]]:
    """Features of a sound that `distance` compares: [(features `B T F`, weight)]."""
    found, factor = [], _frame_factor(sample_rate)
    for n_fft, bands in ((factor * size, bands) for size, bands in _RESOLUTIONS):
        power = stft_power(sound, n_fft) * (1024 / n_fft)
        mel = jnp.log10(power @ _filters(sample_rate, n_fft, bands) + 3e-6)
        found.append((mel, 1.0))
        if n_fft // factor in _LINEAR:
            found.append((0.5 * jnp.log10(power + 1e-4), 0.5))
    return found


def distance(x, y) -> jax.Array:
    """Distance of two sounds from `analyse`: scalar.

    Per frame it is the root of the mean square difference of the features, a Euclidean norm, so
    that the energy distance below is a proper score (Szekely and Rizzo 2013).
    """
    total = 0.0
    for (a, weight), (b, _) in zip(x, y):
        squares = jnp.mean(jnp.square(a - b), axis=-1)
        total += weight * jnp.mean(jnp.sqrt(squares + 1e-8))
    return total / len(_RESOLUTIONS)


def energy_distance(x, y, other) -> jax.Array:
    """d(y, x) + d(y', x) - d(y, y') for two draws y and y' of the decoder: scalar.

    Its expectation is least when the draws are distributed as the sounds x are. The arguments are
    from `analyse`.
    """
    return distance(y, x) + distance(other, x) - distance(y, other)


def relative_l1(y: jax.Array, x: jax.Array, n_fft: int) -> jax.Array:
    """Mean absolute difference of STFT magnitudes over the mean of x's, mean over the sounds.

    The mean of x's counts as at least `_QUIET`: the background noise of a silent passage cannot be
    predicted, and must not outweigh what sounds elsewhere.
    """
    found, wanted = (jnp.sqrt(stft_power(sound, n_fft) + 1e-9) for sound in (y, x))
    level = jnp.maximum(wanted.mean((1, 2)), _QUIET)
    return jnp.mean(jnp.abs(found - wanted).mean((1, 2)) / level)

"""Discriminators of sounds, for codecs that are trained for hours.

Some look at the waveform folded by a period (Kong et al. 2020, HiFi-GAN), others at spectrograms of
several resolutions (Jang et al. 2021, UnivNet). The losses are those of least squares (Mao et al.
2017) and the distance of their features (Larsen et al. 2016).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vcm_jax.codec.losses import stft_power

_PERIODS = (2, 3, 5, 7, 11)
_RESOLUTIONS = (2048, 1024, 512)
_WIDTHS = (32, 64, 128, 256)


def _activation(x):
    return nn.leaky_relu(x, 0.1)


class _Convolutions(nn.Module):
    """Convolutions over (rows, columns); returns the features of each and a map of scores."""

    kernel: tuple[int, int]
    stride: tuple[int, int]

    @nn.compact
    def __call__(self, x):
        features = []
        for i, width in enumerate(_WIDTHS):
            x = _activation(nn.Conv(width, self.kernel, self.stride, name=f"conv_{i}")(x))
            features.append(x)
        return features, nn.Conv(1, (3, 1), name="score")(x)


class Discriminators(nn.Module):
    """Sounds (B, samples) to [(features, scores)], one entry for each period and resolution."""

    @nn.compact
    def __call__(self, sound):
        found = []
        for period in _PERIODS:
            rows = -(-sound.shape[1] // period)
            x = jnp.pad(sound, ((0, 0), (0, rows * period - sound.shape[1])))
            x = x.reshape(-1, rows, period, 1)
            found.append(_Convolutions((5, 1), (3, 1), name=f"period_{period}")(x))
        for n_fft in _RESOLUTIONS:
            x = jnp.log10(stft_power(sound, n_fft) + 1e-6)[..., None]
            found.append(_Convolutions((3, 9), (1, 2), name=f"resolution_{n_fft}")(x))
        return found


def discriminator_loss(real, generated) -> jax.Array:
    """Least-squares loss: scores of real sounds go to 1, of generated ones to 0. Scalar."""
    losses = [
        jnp.mean(jnp.square(wanted - 1)) + jnp.mean(jnp.square(found))
        for (_, wanted), (_, found) in zip(real, generated)
    ]
    return sum(losses) / len(losses)


def adversarial_losses(real, generated) -> tuple[jax.Array, jax.Array]:
    """(least-squares loss of the codec, mean distance of the features); scalars."""
    scores = [jnp.mean(jnp.square(found - 1)) for _, found in generated]
    features = [
        jnp.mean(jnp.abs(a - b)) / (jnp.mean(jnp.abs(a)) + 1e-6)
        for (wanted, _), (found, _) in zip(real, generated)
        for a, b in zip(wanted, found)
    ]
    return sum(scores) / len(scores), sum(features) / len(features)

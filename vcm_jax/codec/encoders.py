"""Encoders of the learned codec: sound to the mean and the standard deviation of latents.

`LinearEncoder` is the principal components of a log-mel spectrogram, as the linear codec has them.
`LearnedEncoder` is a network on the same spectrogram, whose latents have a distribution, kept close
to the standard normal one as in a VAE (Kingma and Welling 2014).
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from vcm_jax.codec.fourier import Block, shift

_MIN_LOG_VARIANCE, _MAX_LOG_VARIANCE = -12.0, 4.0


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Sizes of the learned encoder.

    Attributes:
      width: channels.
      blocks: number of blocks.
      kernel: taps of the depthwise convolutions, odd.
    """

    width: int = 192
    blocks: int = 3
    kernel: int = 7


ENCODERS = {"tiny": EncoderConfig(), "base": EncoderConfig(width=512, blocks=8)}


class LearnedEncoder(nn.Module):
    """Stacked log-mel frames to latents.

    Attributes:
      config: sizes.
      latent_dim: C.
    """

    config: EncoderConfig
    latent_dim: int

    @nn.compact
    def __call__(self, rows, mask=None):
        """
        Args:
          rows: `B N 2bands` from `mel.stacked_mel`, of mean 0 and std 1 per entry.
          mask: `B N 1`, 0 for rows after the end of the sound; None is all 1.

        Returns:
          (mean, log variance), `B N C` each, float32.
        """
        mask = jnp.ones((*rows.shape[:2], 1), rows.dtype) if mask is None else mask
        x = rows * mask
        x = nn.Dense(self.config.width, name="stack")(
            jnp.concatenate([shift(x, -1), x, shift(x, 1)], axis=-1)
        )
        x = x * mask
        for i in range(self.config.blocks):
            x = Block(self.config.kernel, name=f"block_{i}")(x, mask)
        x = nn.LayerNorm(name="norm")(x)
        found = nn.Dense(2 * self.latent_dim, name="latents")(x).astype(jnp.float32)
        mean, log_variance = jnp.split(found, 2, axis=-1)
        return mean, jnp.clip(log_variance, _MIN_LOG_VARIANCE, _MAX_LOG_VARIANCE)


def kl_divergence(mean: jax.Array, log_variance: jax.Array) -> jax.Array:
    """Mean divergence of the latents from the standard normal distribution, per entry: scalar."""
    return 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance)

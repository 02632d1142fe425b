"""A decoder of latents with a Fourier head: an STFT with learned noise, inverted to sound.

A trunk of ConvNeXt blocks (Liu et al. 2022) runs at the rate of the latents, a second, narrower
one at four times that rate, as in Vocos (Siuzdak 2023). The head predicts for every bin of the
STFT a log magnitude a, a phase p and the log magnitude n of a noise:

    S = exp(a) exp(i (p + 2 pi k t hop / n_fft)) + exp(n) (g1 + i g2),  g1, g2 ~ N(0, 1)

for bin k and frame t. Frames are centred in their hop, so that latent i covers the samples from
i * hop_of_latent on, as in the codecs' spectrograms. All functions are pure.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vcm_jax.codec.mel import hann_window

_UPSAMPLE = 4  # STFT frames per latent
_MAX_LOG = 5.0  # cap of the exponents
_NOISE_BIAS = -4.0  # initial n: almost no noise


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes of the decoder.

    Attributes:
      width: channels at the rate of the latents.
      blocks: number of blocks at that rate.
      fine_width: channels at the rate of the STFT.
      fine_blocks: number of blocks there.
      kernel: taps of the depthwise convolutions, odd.
    """

    width: int = 256
    blocks: int = 3
    fine_width: int = 160
    fine_blocks: int = 2
    kernel: int = 7

    @property
    def context(self) -> int:
        """Latents on either side of a latent that affect the samples it covers."""
        half = self.kernel // 2
        # The stacked neighbours; the blocks; the fine blocks and the overlap of the STFT's frames.
        return 1 + self.blocks * half + -(-(self.fine_blocks * half + 2) // _UPSAMPLE)


DECODERS = {
    "tiny": DecoderConfig(),
    "base": DecoderConfig(width=512, blocks=8, fine_width=384, fine_blocks=4),
}


def shift(x: jax.Array, by: int) -> jax.Array:
    """x[:, i + by] for every i, with zeros from outside: `B N C`."""
    pad = [(0, 0), (max(0, -by), max(0, by)), (0, 0)]
    start = max(0, by)
    return jnp.pad(x, pad)[:, start : start + x.shape[1]]


class Block(nn.Module):
    """A ConvNeXt block along time; rows outside the clip (`mask` 0) stay zero."""

    kernel: int

    @nn.compact
    def __call__(self, x, mask):
        width, half = x.shape[-1], self.kernel // 2
        taps = self.param("taps", nn.initializers.normal(self.kernel**-0.5), (self.kernel, width))
        bias = self.param("bias", nn.initializers.zeros, (width,))
        # A sum of shifted products is several times faster on CPUs than a grouped convolution.
        taps, bias = taps[:, None, None], bias[None, None]
        y = sum(shift(x, i - half) * taps[i] for i in range(self.kernel)) + bias
        y = nn.LayerNorm(name="norm")(y)
        y = nn.Dense(3 * width, name="mlp_in")(y)
        y = nn.Dense(width, name="mlp_out")(nn.gelu(y))
        return (x + y) * mask


class FourierDecoder(nn.Module):
    """Latents to the parameters of the STFT.

    Attributes:
      config: sizes.
      n_fft: samples per STFT frame; four frames, a quarter of this apart, belong to each latent.
    """

    config: DecoderConfig
    n_fft: int

    @nn.compact
    def __call__(self, latents, mask=None):
        """
        Args:
          latents: `B N C`, of mean 0 and std 1 per channel.
          mask: `B N 1`, 1 for latents of the clip and 0 for those after its end; None is all 1.

        Returns:
          a, p, n: `B 4N n_fft/2+1` each, float32.
        """
        c = self.config
        mask = jnp.ones((*latents.shape[:2], 1), latents.dtype) if mask is None else mask
        x = latents * mask
        x = jnp.concatenate([shift(x, -1), x, shift(x, 1)], axis=-1)
        x = nn.Dense(c.width, name="stack")(x) * mask
        for i in range(c.blocks):
            x = Block(c.kernel, name=f"block_{i}")(x, mask)
        x = nn.Dense(_UPSAMPLE * c.fine_width, name="upsample")(x)
        fine = fine_mask(mask)
        x = x.reshape(x.shape[0], -1, c.fine_width) * fine
        for i in range(c.fine_blocks):
            x = Block(c.kernel, name=f"fine_block_{i}")(x, fine)
        x = nn.LayerNorm(name="norm")(x)
        bins = self.n_fft // 2 + 1
        head = nn.Dense(3 * bins, name="head", bias_init=_head_bias)(x).astype(jnp.float32)
        return jnp.split(head, 3, axis=-1)


def _head_bias(key, shape, dtype=jnp.float32):
    bins = shape[0] // 3
    return jnp.concatenate([jnp.zeros(2 * bins), jnp.full(bins, _NOISE_BIAS)]).astype(dtype)


def fine_mask(mask: jax.Array) -> jax.Array:
    """The mask of latents, `B N 1`, for STFT frames: `B 4N 1`."""
    return jnp.repeat(mask, _UPSAMPLE, axis=1)


def draw_noise(key: jax.Array, first: jax.Array | int, count: int, n_fft: int) -> jax.Array:
    """The noise of a clip's latents `first` to `first + count - 1`.

    It is a function of the clip's key and of each latent's number, so that a long clip can be
    decoded in any windows.

    Returns:
      `4count n_fft/2+1 2` float32.
    """
    numbers = first + jnp.arange(count)
    keys = jax.vmap(lambda number: jax.random.fold_in(key, number))(numbers)
    shape = (_UPSAMPLE, n_fft // 2 + 1, 2)
    drawn = jax.vmap(lambda each: jax.random.normal(each, shape))(keys)
    return drawn.reshape(-1, *shape[1:])


def spectrum(head, noise: jax.Array | None) -> jax.Array:
    """The complex STFT `B T bins` from (a, p, n), `B T bins` each, and noise `B T bins 2`.

    Without noise it is the deterministic part alone.
    """
    a, p, n = head
    bins = a.shape[-1]
    # A frame's phase advances by a quarter of its bin's turns from frame to frame.
    turns = np.outer(np.arange(_UPSAMPLE), np.arange(bins)) % _UPSAMPLE / _UPSAMPLE
    advance = np.tile(turns, (a.shape[1] // _UPSAMPLE, 1)).astype(np.float32)[None]
    phase = p + 2 * np.pi * advance
    magnitude = jnp.exp(jnp.minimum(a, _MAX_LOG))
    real, imag = magnitude * jnp.cos(phase), magnitude * jnp.sin(phase)
    if noise is not None:
        level = jnp.exp(jnp.minimum(n, _MAX_LOG))
        real, imag = real + level * noise[..., 0], imag + level * noise[..., 1]
    return jax.lax.complex(real, imag)


def inverse_stft(spectrum: jax.Array, n_fft: int, mask: jax.Array | None = None) -> jax.Array:
    """Sound from STFT frames whose hop is a quarter of their length.

    Args:
      spectrum: `B T bins`, complex; frame t is centred at sample (t + 1/2) n_fft / 4.
      n_fft: samples per frame.
      mask: `B T 1`, 0 for frames that count as absent.

    Returns:
      (B, T n_fft / 4) float32.
    """
    window, hop = hann_window(n_fft)[None, None], n_fft // _UPSAMPLE
    frames = jnp.fft.irfft(spectrum, n_fft) * window
    weights = jnp.ones((*frames.shape[:2], 1), jnp.float32) if mask is None else mask
    summed = _overlap_add(frames * weights, hop)
    squares = _overlap_add(weights * np.square(window), hop)
    # The first frame begins n_fft / 2 - hop / 2 samples before the sound does.
    start, length = (n_fft - hop) // 2, frames.shape[1] * hop
    summed, squares = summed[:, start : start + length], squares[:, start : start + length]
    return summed / jnp.maximum(squares, 1e-6)


def _overlap_add(frames: jax.Array, hop: int) -> jax.Array:
    """Frames `B T n` that begin `hop` apart, summed: (B, (T - 1) hop + n)."""
    batch, count, length = frames.shape
    parts = frames.reshape(batch, count, length // hop, hop)
    extra = length // hop - 1
    padded = [
        jnp.pad(parts[:, :, i], ((0, 0), (i, extra - i), (0, 0))) for i in range(length // hop)
    ]
    return sum(padded).reshape(batch, -1)

"""BigVGAN, mel spectrogram to sound (Lee et al., "BigVGAN: A Universal Neural Vocoder", 2023).

The 16 kHz vocoder of MMAudio and NVIDIA's BigVGAN-v2 for 44.1 kHz. Pure functions of a flat dict
of arrays, which have the names of the original state dict and weight norm folded in. The shapes of
the arrays determine rates and widths. Arrays have time before channels.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vcm_jax.codec.conv import conv, precision

_TAPS = 12
_KERNELS = (3, 7, 11)  # of the three AMP blocks in a stage
_DILATIONS = (1, 3, 5)


def _low_pass() -> np.ndarray:
    """The anti-aliasing filter, (12,) float32: a Kaiser-windowed sinc, cutoff 1/4, sum 1."""
    attenuation = 2.285 * (_TAPS / 2 - 1) * math.pi * 4 * 0.3 + 7.95
    window = np.kaiser(_TAPS, 0.1102 * (attenuation - 8.7))
    taps = window * np.sinc(0.5 * (np.arange(_TAPS) - (_TAPS - 1) / 2))
    return (taps / taps.sum()).astype(np.float32)


def _shifted_sum(taps, x: jax.Array, length: int) -> jax.Array:
    """sum_j taps[j] x[:, j : j + length]: a convolution of each channel with the same filter."""
    return sum(float(tap) * x[:, j : j + length] for j, tap in enumerate(taps))


def _pad(x: jax.Array, first: jax.Array, last: jax.Array, before: int, after: int) -> jax.Array:
    """Pad `x` with copies of the frames `first` (before) and `last` (after), (B, 1, C) each."""

    def copies(frame, count):
        return jnp.broadcast_to(frame, (frame.shape[0], count, frame.shape[2]))

    # The copies overwrite zeros. With a concatenation XLA would make one fusion per operand and
    # recompute `x` in each.
    x = lax.pad(x, np.float32(0), ((0, 0, 0), (before, after, 0), (0, 0, 0)))
    x = lax.dynamic_update_slice_in_dim(x, copies(first, before), 0, axis=1)
    return lax.dynamic_update_slice_in_dim(x, copies(last, after), x.shape[1] - after, axis=1)


def anti_aliased_up(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Double the rate, with repeated edges: the even and the odd samples, (B, L, C) each."""
    taps, length = 2 * _low_pass()[::-1], x.shape[1]
    x = _pad(x, x[:, :1], x[:, -1:], 3, 3)
    return _shifted_sum(taps[0::2], x, length), _shifted_sum(taps[1::2], x[:, 1:], length)


def anti_aliased_down(even: jax.Array, odd: jax.Array) -> jax.Array:
    """Halve the rate of the signal with these even and odd samples, with repeated edges."""
    taps, length = _low_pass(), even.shape[1]
    first, last = even[:, :1], odd[:, -1:]
    even, odd = _pad(even, first, last, 2, 3), _pad(odd, first, last, 3, 2)
    return _shifted_sum(taps[1::2], even, length) + _shifted_sum(taps[0::2], odd, length)


def sin_squared(x: jax.Array) -> jax.Array:
    """sin(x)^2 for |x| < 20000, exact to float32 rounding, far faster on CPUs than XLA's sine.

    The nearest multiple of pi is subtracted in three steps (Cody and Waite's reduction), of which
    the first two are exact. On the remainder, in [-pi/2, pi/2], the Taylor series has an error
    below 1e-9.
    """
    multiple = jnp.round(x * np.float32(1 / np.pi))
    for digits in (3.140625, 9.67502593994140625e-4, 1.509957990978376432e-7):
        x = x - multiple * np.float32(digits)
    square, sine = x * x, np.float32(1 / math.factorial(13))
    for power in (11, 9, 7, 5, 3, 1):
        sine = sine * square + np.float32((-1) ** (power // 2) / math.factorial(power))
    return (x * sine) ** 2


def snake_beta(params: dict, name: str, x: jax.Array) -> jax.Array:
    """x + sin^2(a x) / b with a and b per channel: (B, L, C)."""
    alpha = jnp.exp(params[f"{name}.act.alpha"])[None, None]
    beta = jnp.exp(params[f"{name}.act.beta"])[None, None]
    return x + sin_squared(x * alpha) / (beta + 1e-9)


def activation(params: dict, name: str, x: jax.Array) -> jax.Array:
    """SnakeBeta at twice the rate, to keep its harmonics from aliasing: (B, L, C)."""
    even, odd = anti_aliased_up(x)
    return anti_aliased_down(snake_beta(params, name, even), snake_beta(params, name, odd))


def upsample(params: dict, name: str, x: jax.Array) -> jax.Array:
    """Transposed convolution of stride u and kernel size 2u, with u / 2 cut off on both sides.

    Args:
      params: `{name}.weight` (2u, C, D) and `{name}.bias` (D,).
      x: (B, L, C).

    Returns:
      (B, u L, D).
    """
    kernel = params[f"{name}.weight"]
    rate = kernel.shape[0] // 2
    # A frame affects 2u samples and a sample depends on two frames: two products suffice, and
    # no zeros are multiplied.
    here, next_ = (
        jnp.einsum(
            "blc,ucd->blud",
            x.astype(kernel.dtype),
            half,
            precision=precision(kernel),
            preferred_element_type=jnp.float32,
        ).reshape(x.shape[0], -1, kernel.shape[2])
        for half in (kernel[:rate], kernel[rate:])
    )
    zeros = ((0, 0), (rate, 0), (0, 0)), ((0, 0), (0, rate), (0, 0))
    y = jnp.pad(next_, zeros[0]) + jnp.pad(here, zeros[1])
    return y[:, rate // 2 : y.shape[1] - rate // 2] + params[f"{name}.bias"][None, None]


def amp_block(params: dict, name: str, x: jax.Array) -> jax.Array:
    """Anti-aliased multi-periodicity block: (B, L, C) -> (B, L, C)."""
    for n, dilation in enumerate(_DILATIONS):
        h = activation(params, f"{name}.activations.{2 * n}", x)
        h = conv(params, f"{name}.convs1.{n}", h, dilation)
        h = activation(params, f"{name}.activations.{2 * n + 1}", h)
        x = x + conv(params, f"{name}.convs2.{n}", h)
    return x


def rates(params: dict) -> list[int]:
    """The upsampling rates of the stages; their product is the number of samples per frame."""
    stages = sum(name.startswith("ups.") and name.endswith(".weight") for name in params)
    return [params[f"ups.{i}.0.weight"].shape[0] // 2 for i in range(stages)]


def context(params: dict) -> int:
    """The largest number of frames on either side of a frame that affect its samples."""
    per_activation = 6  # 3 frames up, 3 down
    convolutions = sum((max(_KERNELS) - 1) // 2 * (dilation + 1) for dilation in _DILATIONS)
    block = 2 * len(_DILATIONS) * per_activation + convolutions
    frames, rate = 3.0, 1
    for u in rates(params):
        frames += 1 / rate  # a transposed convolution also reads the next frame
        rate *= u
        frames += block / rate
    return math.ceil(frames + (per_activation + 3) / rate)


def vocode(params: dict, mel: jax.Array, tanh: bool) -> jax.Array:
    """Log-mel spectrogram to sound.

    Args:
      params: see the module.
      mel: (B, L, bands).
      tanh: whether tanh bounds the sound; otherwise it is clipped.

    Returns:
      (B, L * samples per frame) in [-1, 1].
    """
    sound = vocode_unbounded(params, mel)
    return jnp.tanh(sound) if tanh else jnp.clip(sound, -1.0, 1.0)


def vocode_unbounded(params: dict, mel: jax.Array) -> jax.Array:
    """`vocode` without the bound."""
    x = conv(params, "conv_pre", mel)
    for i in range(len(rates(params))):
        x = upsample(params, f"ups.{i}.0", x)
        blocks = (f"resblocks.{len(_KERNELS) * i + j}" for j in range(len(_KERNELS)))
        x = sum(amp_block(params, name, x) for name in blocks) / len(_KERNELS)
    return conv(params, "conv_post", activation(params, "activation_post", x))[..., 0]

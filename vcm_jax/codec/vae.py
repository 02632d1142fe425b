"""MMAudio's VAE of log-mel spectrograms (mmaudio/ext/autoencoder): mel <-> latents.

Pure functions of a flat dict of arrays, which have the names of the original state dict. The layers
preserve magnitudes (Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion
Models", 2024). Their weights must be normalised, which `vcm_jax.interop.import_codec` does.
"""

import jax
import jax.numpy as jnp

from vcm_jax.codec.conv import conv, precision

_CLIP = 256.0  # bound of the activations after every block


def _pixel_norm(x: jax.Array) -> jax.Array:
    return x / (1e-4 + jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True)))


def _mp_silu(x: jax.Array) -> jax.Array:
    return jax.nn.silu(x) / 0.596


def _mp_sum(a: jax.Array, b: jax.Array) -> jax.Array:
    return (0.7 * a + 0.3 * b) / (0.7**2 + 0.3**2) ** 0.5


def res_block(params: dict, name: str, x: jax.Array) -> jax.Array:
    """(B, L, C) -> (B, L, D). The skip connection starts at the normalised input."""
    x = _pixel_norm(x)
    h = conv(params, f"{name}.conv1", _mp_silu(x))
    h = conv(params, f"{name}.conv2", _mp_silu(h))
    if f"{name}.nin_shortcut.weight" in params:
        x = conv(params, f"{name}.nin_shortcut", x)
    return _mp_sum(x, h)


def attention(params: dict, name: str, x: jax.Array) -> jax.Array:
    """Self-attention with one head over the whole clip: (B, L, C) -> (B, L, C)."""
    exactness = precision(params[f"{name}.qkv.weight"])
    qkv = conv(params, f"{name}.qkv", x)
    qkv = qkv.reshape(*x.shape, 3)  # q, k, v is the fastest index
    q, k, v = (_pixel_norm(qkv[..., j]) for j in range(3))
    scores = jnp.einsum("blc,bmc->blm", q, k, precision=exactness) / x.shape[-1] ** 0.5
    y = jnp.einsum("blm,bmc->blc", jax.nn.softmax(scores), v, precision=exactness)
    return _mp_sum(x, conv(params, f"{name}.proj_out", y))


def downsample(params: dict, name: str, x: jax.Array) -> jax.Array:
    """(B, L, C) -> (B, L / 2, C); L is even."""
    x = conv(params, f"{name}.conv1", x)
    return conv(params, f"{name}.conv2", (x[:, 0::2] + x[:, 1::2]) / 2)


def upsample(params: dict, name: str, x: jax.Array) -> jax.Array:
    """(B, L, C) -> (B, 2 L, C)."""
    return conv(params, f"{name}.conv", jnp.repeat(x, 2, axis=1))


def _middle(params: dict, name: str, x: jax.Array) -> jax.Array:
    x = res_block(params, f"{name}.block_1", x)
    x = attention(params, f"{name}.attn_1", x)
    return _clip(res_block(params, f"{name}.block_2", x))


def _clip(x: jax.Array) -> jax.Array:
    return jnp.clip(x, -_CLIP, _CLIP)


def encode(params: dict, mel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-mel spectrogram to the distribution of the latents.

    Args:
      params: `data_mean` and `data_std` (bands,), `encoder.*`.
      mel: (B, L, bands) with even L.

    Returns:
      mean and std (B, L / 2, latent_dim).
    """
    x = (mel - params["data_mean"][None, None]) / params["data_std"][None, None]
    x = conv(params, "encoder.conv_in", x)
    for level in range(3):
        for block in range(2):
            x = _clip(res_block(params, f"encoder.down.{level}.block.{block}", x))
        if level == 0:
            x = downsample(params, "encoder.down.0.downsample", x)
    x = _middle(params, "encoder.mid", x)
    mean, log_variance = jnp.split(conv(params, "encoder.conv_out", _mp_silu(x)), 2, axis=-1)
    return mean, jnp.exp(jnp.clip(log_variance, -30.0, 20.0) / 2)


def decode(params: dict, latents: jax.Array) -> jax.Array:
    """Latents to log-mel spectrogram.

    Args:
      params: `data_mean` and `data_std` (bands,), `decoder.*`.
      latents: (B, N, latent_dim).

    Returns:
      (B, 2 N, bands).
    """
    x = _middle(params, "decoder.mid", conv(params, "decoder.conv_in", latents))
    for level in (2, 1, 0):
        for block in range(3):
            x = _clip(res_block(params, f"decoder.up.{level}.block.{block}", x))
        if level == 1:
            x = upsample(params, "decoder.up.1.upsample", x)
    x = conv(params, "decoder.conv_out", _mp_silu(x))
    return x * params["data_std"][None, None] + params["data_mean"][None, None]

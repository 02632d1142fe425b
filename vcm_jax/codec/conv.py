"""The one-dimensional convolution of the VAE and the vocoders, time before channels."""

import jax
import jax.numpy as jnp
from jax import lax


def precision(kernel: jax.Array):
    """float32 products are exact on all platforms only on request; bfloat16 is for speed."""
    return lax.Precision.HIGHEST if kernel.dtype == jnp.float32 else lax.Precision.DEFAULT


def conv(params: dict, name: str, x: jax.Array, dilation: int = 1) -> jax.Array:
    """'Same' convolution with zero padding, and a bias if there is one.

    Args:
      params: `{name}.weight` (k, C, D) with odd k, and optionally `{name}.bias` (D,). A bfloat16
        weight makes the products bfloat16; sums and results stay float32.
      x: (B, L, C) float32.
      dilation: samples between neighbouring taps.

    Returns:
      (B, L, D) float32.
    """
    kernel = params[f"{name}.weight"]
    pad = (kernel.shape[0] - 1) * dilation // 2
    y = lax.conv_general_dilated(
        x.astype(kernel.dtype),
        kernel,
        window_strides=(1,),
        padding=[(pad, pad)],
        rhs_dilation=(dilation,),
        dimension_numbers=("NWC", "WIO", "NWC"),
        precision=precision(kernel),
        preferred_element_type=jnp.float32,
    )
    bias = params.get(f"{name}.bias")
    return y if bias is None else y + bias[None, None]

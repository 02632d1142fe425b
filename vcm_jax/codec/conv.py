"""The one-dimensional convolution of the VAE and the vocoders, time before channels."""

import jax
import jax.numpy as jnp
from jax import lax

from vcm_jax.codec import fast_conv


def precision(kernel: jax.Array):
    """float32 products are exact on all platforms only on request; bfloat16 is for speed."""
    return lax.Precision.HIGHEST if kernel.dtype == jnp.float32 else lax.Precision.DEFAULT


def conv(params: dict, name: str, x: jax.Array, dilation: int = 1) -> jax.Array:
    """'Same' convolution with zero padding, and a bias if there is one.

    Args:
      params: `{name}.weight` (k, C, D) with odd k, and optionally `{name}.bias` (D,). A bfloat16
        weight makes the products bfloat16; sums and results stay float32. `{name}.points` in place
        of the weight is from `for_cpus`.
      x: (B, L, C) float32.
      dilation: samples between neighbouring taps.

    Returns:
      (B, L, D) float32.
    """
    if f"{name}.points" in params:
        y = fast_conv.convolve(params[f"{name}.points"], x, dilation)
    else:
        y = _direct(params[f"{name}.weight"], x, dilation)
    bias = params.get(f"{name}.bias")
    return y if bias is None else y + bias[None, None]


def _direct(kernel: jax.Array, x: jax.Array, dilation: int) -> jax.Array:
    pad = (kernel.shape[0] - 1) * dilation // 2
    return lax.conv_general_dilated(
        x.astype(kernel.dtype),
        kernel,
        window_strides=(1,),
        padding=[(pad, pad)],
        rhs_dilation=(dilation,),
        dimension_numbers=("NWC", "WIO", "NWC"),
        precision=precision(kernel),
        preferred_element_type=jnp.float32,
    )


def for_cpus(params: dict) -> dict:
    """`params` with the kernels as `fast_conv` wants them wherever that is faster on a CPU."""

    def place(name, array):
        if name.endswith(".weight") and fast_conv.is_faster(array):
            return f"{name.removesuffix('weight')}points", fast_conv.at_points(array)
        return name, array

    return dict(place(name, array) for name, array in params.items())

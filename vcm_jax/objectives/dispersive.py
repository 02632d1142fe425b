"""Dispersive regularisation: a batch's activations move apart (Wang and He 2025, 2506.09027)."""

import jax
import jax.numpy as jnp

from vcm_jax.objectives.common import at_least_float32


def dispersive_loss(z):
    """log mean_ij exp(-|z_i - z_j|^2 / D), a scalar: 0 where all rows are the same, else below.

    All pairs count, each row with itself too. The temperature is 1.

    Args:
      z: `B D`, an activation of each row of the batch.
    """
    z = at_least_float32(z)
    squares = jnp.square(z).sum(-1)
    products = jnp.matmul(z, z.T, precision="highest")
    distances = jnp.maximum(squares[:, None] + squares[None] - 2 * products, 0) / z.shape[-1]
    return jax.nn.logsumexp(-distances) - 2 * jnp.log(len(z))

"""What the objectives share."""

import jax
import jax.numpy as jnp


def at_least_float32(x):
    """`x`, as float32 where it is narrower: times, losses and weights never lose precision."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(jnp.float32, x.dtype))


def expand(time, like):
    """`B` -> `B 1 ... 1` with the rank of `like`."""
    return time.reshape(time.shape + (1,) * (like.ndim - 1))


def select_rows(mask, if_true, if_false):
    """Rows of one pytree or another: mask bool `B`, leaves with a leading batch axis."""
    return jax.tree.map(lambda a, b: jnp.where(expand(mask, a), a, b), if_true, if_false)


def noised(x0, x1, t):
    """x_t = (1 - t) x0 + t x1."""
    t = expand(t, x0)
    return (1 - t) * x0 + t * x1


def mean_square(x):
    """Mean over all axes but the first: `B ...` -> `B`."""
    return jnp.square(x).mean(tuple(range(1, x.ndim)))


def adaptive_weight(mse, p: float, eps: float):
    """sg(1 / (mse + eps)^p) (SoundVCM eq. 11), `B` -> `B`."""
    return jax.lax.stop_gradient((mse + eps) ** -p)

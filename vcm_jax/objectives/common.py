"""Arithmetic that the objectives share."""

import jax
import jax.numpy as jnp


def check_rows(num_instant: int, batch_size: int) -> None:
    """Raises ValueError when the batch has fewer rows than `num_instant`."""
    if not 0 <= num_instant <= batch_size:
        raise ValueError(f"num_instant {num_instant} is not within the batch of {batch_size} rows")


def at_least_float32(x):
    """`x`, cast to float32 if it is narrower: times, losses and weights never lose precision."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(jnp.float32, x.dtype))


def wide(u):
    """The function `u`, with its result cast to at least float32."""
    return lambda *args: at_least_float32(u(*args))


def identity(tree):
    """The default of `constrain`: on one device there is nothing to spread."""
    return tree


def expand(time, like):
    """`B` -> `B 1 ... 1` with the rank of `like`."""
    return time.reshape(time.shape + (1,) * (like.ndim - 1))


def select_rows(mask, if_true, if_false):
    """Each row from one of two pytrees: mask bool `B`, leaves with a leading batch axis."""
    return jax.tree.map(lambda a, b: jnp.where(expand(mask, a), a, b), if_true, if_false)


def for_targets(u, target_u, predicted):
    """The network that targets take, and those of its predictions that are known already.

    Args:
      u: the network that is trained, at least float32.
      target_u: another one for the targets, as `vcm_loss`'s; None takes `u`.
      predicted: of `u`, with gradient.
    """
    return (u, predicted) if target_u is None else (wide(target_u), predicted[:0])


def rows(start, stop, constrain=identity):
    """A function tree -> its rows from `start` to `stop`, spread over the devices again."""
    return lambda tree: constrain(jax.tree.map(lambda a: a[start:stop], tree))


def noised(x0, x1, t):
    """x_t = (1 - t) x0 + t x1: `B N C`, `B N C`, `B` -> `B N C`."""
    t = expand(t, x0)
    return (1 - t) * x0 + t * x1


def mean_square(x):
    """The mean square over all axes but the first: `B ...` -> `B`."""
    return jnp.square(x).mean(tuple(range(1, x.ndim)))


def adaptive_weight(mse, p: float, eps: float):
    """sg(1 / (mse + eps)^p) (SoundVCM eq. 11): `B` -> `B`."""
    return jax.lax.stop_gradient((mse + eps) ** -p)


def regression(predicted, target, v, num_instant: int, p: float, eps: float):
    """The weighted regression of a prediction on a target (SoundVCM eq. 10, 11).

    Args:
      predicted: `B N C`, with gradient.
      target: `B N C`; no gradient goes through it.
      v: x1 - x0, `B N C`.
      num_instant: the number of rows with s = t, which come first.
      p, eps: of the adaptive weight.

    Returns:
      The scalar loss and aux, as `vcm.vcm_loss`.
    """
    target = jax.lax.stop_gradient(target)
    mse = mean_square(predicted - target)
    loss = (adaptive_weight(mse, p, eps) * mse).mean()
    velocity_mse = mean_square(predicted[:num_instant] - v[:num_instant])
    return loss, {"mse": mse, "target": target, "velocity_mse": velocity_mse}

"""Times: how t and s are drawn, and the schedule of l between them (SoundVCM 3.2)."""

import jax
import jax.numpy as jnp

# The smallest t - s and t - l (SoundVCM 3.2): over less, average velocities differ by rounding.
MIN_GAP = 1e-4


def logit_normal(key, shape, mean: float, std: float):
    """sigmoid(normal(mean, std)), float32."""
    return jax.nn.sigmoid(mean + std * jax.random.normal(key, shape))


def sample_times(key, batch_size: int, num_instant: int, mean: float, std: float):
    """Times of a batch whose first `num_instant` rows have s = t (SoundVCM 3.2).

    The other rows draw two times and take the larger one as t, the smaller one as s, with
    t >= 1e-4 and s <= t - 1e-4.

    Returns:
      t, s: float32 `B` each, 0 <= s <= t <= 1.
    """
    pair = logit_normal(key, (2, batch_size), mean, std)
    instant = jnp.arange(batch_size) < num_instant
    t = jnp.maximum(jnp.where(instant, pair[0], pair.max(0)), MIN_GAP)
    s = jnp.where(instant, t, jnp.minimum(pair.min(0), t - MIN_GAP))
    return t, s


def sample_dyadic(key, batch_size: int, finest: int):
    """Intervals of a dyadic grid (Frans et al. 2024).

    Lengths are 1, 1/2, ..., 2/finest, all equally likely; an interval starts at a multiple of its
    length.

    Returns:
      t, s: float32 `B` each, 0 <= s < t <= 1.
    """
    level_key, place_key = jax.random.split(key)
    level = jax.random.randint(level_key, (batch_size,), 0, finest.bit_length() - 1)
    intervals = 2**level
    place = jax.random.randint(place_key, (batch_size,), 0, intervals)
    return (place + 1) / intervals, place / intervals


def lambda_schedule(step, steps: int, initial: float, final: float):
    """lambda(k) = initial (final / initial)^(k / K), float32 scalar (SoundVCM eq. 12)."""
    return initial * (final / initial) ** (jnp.asarray(step, jnp.float32) / steps)


def intermediate_time(t, s, lam):
    """l just below t, and its fraction of the way from t to s (SoundVCM eq. 13).

    l = min(t + (s - t) lambda, t - 1e-4). The fraction lambda' = (l - t) / (s - t) is computed
    after that clamp, so that eq. 7 holds exactly.

    Args:
      t, s: times `B`, s < t.
      lam: lambda, a scalar or `B`.

    Returns:
      l and lambda', `B` each.
    """
    l = jnp.minimum(t + (s - t) * lam, t - MIN_GAP)
    return l, (l - t) / (s - t)

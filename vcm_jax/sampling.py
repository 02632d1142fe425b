"""From noise to data with any u(x, t, s, cond) (SoundVCM Algorithm 2)."""

import jax
import jax.numpy as jnp
import numpy as np


def uniform_times(num_steps: int) -> np.ndarray:
    """1, (n-1)/n, ..., 0: the times of an n-step sampler, `num_steps + 1` numbers."""
    if num_steps < 1:
        raise ValueError(f"a sampler takes at least 1 step, not {num_steps}")
    return np.linspace(1, 0, num_steps + 1, dtype=np.float32)


def _intervals(times):
    """(t, s) of every jump, `n 2`; the values are checked where they are known."""
    times = np.asarray(times, np.float32)
    if times.ndim != 1 or len(times) < 2 or not (np.diff(times) < 0).all():
        raise ValueError(f"times must decrease and be at least two, not {times.tolist()}")
    if times[0] > 1 or times[-1] < 0:
        raise ValueError(f"times must lie in [0, 1], not {times.tolist()}")
    return np.stack([times[:-1], times[1:]], 1)


def jump(u, x, t, s, cond):
    """x_s = x_t + (s - t) u(x_t, t, s, c), for scalar times."""
    rows = lambda time: jnp.full(x.shape[0], time, jnp.promote_types(jnp.float32, x.dtype))
    return x + (s - t) * u(x, rows(t), rows(s), cond)


def sample(u, x1, times, cond):
    """Jumps through the times, one evaluation of u each (SoundVCM Algorithm 2).

    Args:
      u: `u(x, t, s, cond)` -> `B N C`.
      x1: noise, or a sample at times[0], `B N C`.
      times: decreasing, within [0, 1]; `uniform_times(n)` are the paper's.
      cond: whatever u takes.

    Returns:
      The sample at times[-1], `B N C`.

    Raises:
      ValueError: when the times do not decrease or leave [0, 1].
    """
    body = lambda x, ts: (jump(u, x, ts[0], ts[1], cond), None)
    return jax.lax.scan(body, x1, jnp.asarray(_intervals(times)))[0]


def guided_velocity(u, null_cond, scale: float):
    """w u(x, t, t, c) + (1 - w) u(x, t, t, null), as a velocity for `sample`.

    With it `sample` is Euler's method with classifier-free guidance, two evaluations a step: how
    a flow-matching model is sampled (MMAudio: 25 steps, w = 4.5).
    """

    def velocity(x, t, s, cond):
        del s
        return scale * u(x, t, t, cond) + (1 - scale) * u(x, t, t, null_cond)

    return velocity


def restart_sample(u, x1, times, cond, key):
    """Jumps to 0, noises to the next time, jumps again (BiTCAM's few-step sampler).

    As `sample`, with linear noising; `key` draws the fresh noise. The last time must be 0.

    Raises:
      ValueError: as `sample`, or when the last time is not 0.
    """
    intervals = _intervals(times)
    if intervals[-1, 1] != 0:
        raise ValueError(f"a restart sampler ends at time 0, not {intervals[-1, 1]}")

    def body(x, step):
        (t, s), key = step
        x0 = jump(u, x, t, jnp.zeros_like(t), cond)
        return (1 - s) * x0 + s * jax.random.normal(key, x.shape, x.dtype), None

    keys = jax.random.split(key, len(intervals))
    return jax.lax.scan(body, x1, (jnp.asarray(intervals), keys))[0]

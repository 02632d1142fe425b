"""Guidance: inside the training target (SoundVCM 3.3), and of an instant velocity when sampling."""

import jax.numpy as jnp


def mix_velocity(v, v_uncond, v_guided, scale, mix_ratio: float):
    """m (w v + (1 - w) v_uncond) + (1 - m) v_guided (SoundVCM eq. 16).

    A velocity whose factor is 0 may be None, so that nobody has to compute it.
    """
    mixed = mix_ratio * scale * v
    for factor, velocity in ((mix_ratio * (1 - scale), v_uncond), (1 - mix_ratio, v_guided)):
        if velocity is not None:
            mixed = mixed + factor * velocity
    return mixed


def within(t, interval: tuple[float, float]):
    """Where guidance is applied: bool, the interval's ends included."""
    return jnp.logical_and(t >= interval[0], t <= interval[1])


def smooth_decay(t, start: float, rate: float):
    """How much guidance is left at t (BiTCAM): 1 up to `start`, then smoothly down to 0 at t = 1.

    1 - exp(-rate (1 - t) / (t - start)), infinitely often differentiable; `start` >= 1 is none.
    """
    if start >= 1:
        return jnp.ones_like(t)
    gone = jnp.where(t > start, t - start, 1)
    return jnp.where(t > start, -jnp.expm1(-rate * (1 - t) / gone), 1)


def guided_velocity(u, null_cond, scale: float, interval: tuple[float, float] = (0.0, 1.0)):
    """w u(x, t, t, c) + (1 - w) u(x, t, t, null) within the interval, u(x, t, t, c) outside.

    A velocity for `sampling.sample`, which then is Euler's method with classifier-free guidance,
    two evaluations a step: how a flow-matching model is sampled (MMAudio: 25 steps, w = 4.5; in
    an interval: Kynkaanniemi et al. 2024). With w = 1 it is one evaluation a step.

    Args:
      u: `u(x, t, s, cond)` -> `B N C`.
      null_cond: the empty condition, with as many rows as `cond`.
      scale: w.
      interval: times t at which guidance applies, ends included.
    """

    def velocity(x, t, s, cond):
        del s
        found = u(x, t, t, cond)
        if scale == 1:
            return found
        w = jnp.where(within(t, interval), scale, 1.0).astype(t.dtype)
        w = w.reshape(w.shape + (1,) * (x.ndim - 1))
        return w * found + (1 - w) * u(x, t, t, null_cond)

    return velocity

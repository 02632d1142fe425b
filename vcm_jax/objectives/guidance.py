"""Guidance: inside the training target (SoundVCM 3.3), and of samples of an instant velocity."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vcm_jax.objectives.common import expand, identity, rows, select_rows


class Guidance(NamedTuple):
    """Guidance as an input of the network: numbers, or arrays `B` with one for each row.

    Attributes:
      scale: w, at least 1; 1 is no guidance.
      low, high: times t between which guidance applies, both ends included.
    """

    scale: Any = 1.0
    low: Any = 0.0
    high: Any = 1.0

    def rows(self, size: int) -> "Guidance":
        """The same with arrays `size`, at least float32."""
        arrays = (jnp.asarray(a, jnp.promote_types(jnp.float32, jnp.result_type(a))) for a in self)
        return Guidance(*(jnp.broadcast_to(a, (size,)) for a in arrays))


# The ranges that the ends of the interval are drawn from (improved MeanFlow, arXiv 2512.02012).
LOW_ENDS, HIGH_ENDS = (0.0, 0.5), (0.5, 1.0)


def draw_guidance(key, batch_size: int, largest: float) -> Guidance:
    """Guidance for each row, float32 `B`, as improved MeanFlow draws it (arXiv 2512.02012).

    log w is uniform between 0 and the logarithm of the largest w. The low end of the interval is
    uniform in [0, 1/2], its high end in [1/2, 1].
    """
    keys, shape = jax.random.split(key, 3), (batch_size,)
    scale = jnp.exp(jax.random.uniform(keys[0], shape) * jnp.log(largest))
    ends = (
        jax.random.uniform(k, shape, minval=a, maxval=b)
        for k, (a, b) in zip(keys[1:], (LOW_ENDS, HIGH_ENDS))
    )
    return Guidance(scale, *ends)


def mix_velocity(v, v_uncond, v_guided, scale, mix_ratio: float):
    """v_mix = m (w v + (1 - w) v_uncond) + (1 - m) v_guided (SoundVCM eq. 16).

    A velocity whose factor is 0 may be None, so that it need not be computed.
    """
    mixed = mix_ratio * scale * v
    for factor, velocity in ((mix_ratio * (1 - scale), v_uncond), (1 - mix_ratio, v_guided)):
        if velocity is not None:
            mixed = mixed + factor * velocity
    return mixed


def within(t, interval):
    """Whether guidance applies at t: bool, the ends of the interval (numbers or `B`) included."""
    return jnp.logical_and(t >= interval[0], t <= interval[1])


def guided_target(
    u,
    predicted,
    x_t,
    v,
    t,
    cond,
    null_cond,
    is_null,
    *,
    scale,
    mix_ratio: float,
    interval=(0.0, 1.0),
    constrain=identity,
):
    """The velocity that rows are trained towards: v_mix where guidance applies, elsewhere v.

    Network passes that have no effect on the result are left out.

    Args:
      u: `u(x, t, s, cond)` -> `B N C`; its instantaneous velocity u(x, t, t, c) is used.
      predicted: u(x_t, t, t, c) of the first rows, `n N C`, where it is known already.
      x_t, v: noised samples and x1 - x0, `B N C`.
      t: times `B`.
      cond, null_cond: pytrees with a leading batch axis, conditions and empty conditions.
      is_null: bool `B`, rows without a condition; they are trained towards v.
      scale: w, a number or one for each row; the number 1 is no guidance.
      mix_ratio: m; 1 does not use the network's own guided velocity.
      interval: times between which guidance and mixing apply, both ends included; two numbers, or
        two arrays with one for each row.
      constrain: spreads joined rows over the devices again.

    Returns:
      `B N C`; no gradient goes through it.
    """
    n, batch_size = predicted.shape[0], x_t.shape[0]
    sg = jax.lax.stop_gradient
    v_uncond = v_guided = None
    guides = not (isinstance(scale, int | float) and scale == 1)
    if mix_ratio > 0 and guides:
        v_uncond = sg(u(x_t, t, t, null_cond))
    if mix_ratio < 1:
        v_guided = sg(predicted)
        if n < batch_size:
            x_rest, t_rest, cond_rest = rows(n, None, constrain)((x_t, t, cond))
            rest = sg(u(x_rest, t_rest, t_rest, cond_rest))
            v_guided = constrain(jnp.concatenate([v_guided, rest]))
    scale = expand(scale, v) if getattr(scale, "ndim", 0) else scale
    mixed = mix_velocity(v, v_uncond, v_guided, scale, mix_ratio)
    return sg(select_rows(within(t, interval) & ~is_null, mixed, v))


def smooth_decay(t, start: float, rate: float):
    """The fraction of the guidance that is left at t (BiTCAM): 1 up to `start`, 0 at t = 1.

    In between it is 1 - exp(-rate (1 - t) / (t - start)), which is smooth at both ends. With
    `start` >= 1 guidance never decays.
    """
    if start >= 1:
        return jnp.ones_like(t)
    gone = jnp.where(t > start, t - start, 1)
    return jnp.where(t > start, -jnp.expm1(-rate * (1 - t) / gone), 1)


def guided_velocity(u, null_cond, scale: float, interval: tuple[float, float] = (0.0, 1.0)):
    """w u(x, t, t, c) + (1 - w) u(x, t, t, null) within the interval, u(x, t, t, c) outside.

    `sampling.sample` with this velocity is Euler's method with classifier-free guidance, at two
    evaluations a step: the way to sample a flow-matching model (MMAudio: 25 steps, w = 4.5; on
    intervals see Kynkaanniemi et al. 2024). With w = 1 a step takes one evaluation.

    Args:
      u: `u(x, t, s, cond)` -> `B N C`.
      null_cond: the empty condition, with as many rows as `cond`.
      scale: w.
      interval: times t at which guidance applies, both ends included.
    """

    def velocity(x, t, s, cond):
        del s
        conditional = u(x, t, t, cond)
        if scale == 1:
            return conditional
        w = expand(jnp.where(within(t, interval), scale, 1.0).astype(t.dtype), x)
        return w * conditional + (1 - w) * u(x, t, t, null_cond)

    return velocity

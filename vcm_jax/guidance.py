"""Guidance inside the training target (SoundVCM 3.3)."""

import jax.numpy as jnp


def mix_velocity(v, v_uncond, v_guided, scale: float, mix_ratio: float):
    """m (w v + (1 - w) v_uncond) + (1 - m) v_guided (SoundVCM eq. 16).

    A term with factor 0 may be None, so that nobody has to compute it.
    """
    mixed = mix_ratio * scale * v
    for factor, velocity in ((mix_ratio * (1 - scale), v_uncond), (1 - mix_ratio, v_guided)):
        if factor != 0:
            mixed = mixed + factor * velocity
    return mixed


def within(t, interval: tuple[float, float]):
    """Where guidance is applied: bool, the interval's ends included."""
    return jnp.logical_and(t >= interval[0], t <= interval[1])

"""Shortcut models: a jump is trained towards two jumps of half its length (Frans et al. 2024)."""

import dataclasses

import jax.numpy as jnp

from vcm_jax.objectives import common, times
from vcm_jax.objectives.base import GuidedObjective, Passes
from vcm_jax.objectives.composed import composed_loss, composed_passes
from vcm_jax.settings import number, power_of_two, setting


@dataclasses.dataclass(frozen=True)
class ShortcutConfig(GuidedObjective):
    """Settings of the objective; proportions and grid are the paper's.

    The paper guides the targets of the shortest jumps alone. Here guidance is part of the target at
    s = t, as in `VCMConfig`, so that jumps of every length are guided.

    Attributes:
      guidance_scale, mix_ratio, guidance_interval, eps, instant_ratio, time_mean, time_std: see
        `GuidedObjective`.
      p: of the adaptive weight; 0, the paper's, is the plain mean squared error.
      finest: M, a power of 2. Jumps have lengths 2 / M, 4 / M, ..., 1 and start at multiples of
        their length; 1 / M counts as s = t. No row trains shorter jumps than 2 / M, so that a
        sampler takes at most M / 2 steps.
    """

    name = "shortcut"
    p: float = setting(0.0, number(0))
    # Its jumps learn from the network alone: without rows with s = t, zero would be a solution.
    instant_ratio: float = setting(0.75, number(above=0, high=1))
    finest: int = setting(128, power_of_two(2, 2**12))  # 1e-4 is the shortest jump of others

    def loss(self, u, *batch, **options):
        return shortcut_loss(u, *batch, self, **options)

    def passes(self) -> Passes:
        return composed_passes(self)

    def draw(self, key, batch_size: int, num_instant: int, step, steps: int):
        """t and s `B`: logit-normal t = s, then jumps on the grid; lam is None."""
        t, s, _ = super().draw(key, batch_size, num_instant, step, steps)
        instant = jnp.arange(batch_size) < num_instant
        jump_t, jump_s = times.sample_dyadic(key, batch_size, self.finest)
        return jnp.where(instant, t, jump_t), jnp.where(instant, s, jump_s), None


def shortcut_loss(
    u, x0, x1, t, s, lam, cond, null_cond, is_null, config: ShortcutConfig, **options
):
    """The shortcut loss: a jump of length 2d is trained towards two jumps of length d.

    u(x_t, t, t - 2d) towards sg((u(x_t, t, t - d) + u(x', t - d, t - 2d)) / 2), with
    x' = x_t - d u(x_t, t, t - d). Where d is the finest length 1 / M, which no row trains, the
    instantaneous velocity stands for the halves (section 3 of the paper). See `composed_loss`, also
    for the cost.

    Arguments and results are those of `vcm_loss`; `lam` has no effect.
    """
    del lam
    t, s = map(common.at_least_float32, (t, s))

    def end_of(t, l):
        return jnp.where(t - l < 1.5 / config.finest, t, l)

    batch = (x0, x1, t, s, (t + s) / 2, cond, null_cond, is_null)
    return composed_loss(u, batch, config, end_of, **options)

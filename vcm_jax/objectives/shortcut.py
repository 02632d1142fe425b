"""Shortcut models: a jump aims at two jumps of half its length (Frans et al. 2024)."""

import dataclasses

import jax.numpy as jnp

from vcm_jax.objectives import common, times


@dataclasses.dataclass(frozen=True)
class ShortcutConfig:
    """Settings of the objective; proportions and grid are the paper's.

    The paper guides the targets of the finest jumps alone; here guidance is trained in at s = t, as
    in `VCMConfig`, so that jumps of every length are guided.

    Attributes:
      finest: M, a power of 2: jumps have lengths 2 / M, 4 / M, ..., 1 and start at multiples of
        their length; 1 / M counts as s = t. Jumps shorter than 2 / M are trained by no row, so that
        a sampler takes at most M / 2 steps.
      guidance_scale, mix_ratio, guidance_interval: of the target at s = t, as `VCMConfig`'s.
      p, eps: of the adaptive weight; p = 0, the paper's, is the plain mean squared error.
      instant_ratio: the part of the rows with s = t.
      time_mean, time_std: mu and sigma of the logit-normal times of the s = t rows.

    Raises:
      ValueError: when a setting is out of its range.
    """

    finest: int = 128
    guidance_scale: float = 4.0
    mix_ratio: float = 0.25
    guidance_interval: tuple[float, float] = (0.0, 0.8)
    p: float = 0.0
    eps: float = 0.01
    instant_ratio: float = 0.75
    time_mean: float = -0.4
    time_std: float = 1.0

    def __post_init__(self):
        common.check_settings(
            self, finest=(lambda m: m >= 2 and m & (m - 1) == 0, "must be a power of 2, >= 2")
        )


def draw(key, batch_size: int, num_instant: int, step, steps: int, config):
    """t and s, `B` each: logit-normal t = s, then jumps on the grid; and no lambda."""
    del step, steps
    t, s = times.sample_times(key, batch_size, num_instant, config.time_mean, config.time_std)
    instant = jnp.arange(batch_size) < num_instant
    jump_t, jump_s = times.sample_dyadic(key, batch_size, config.finest)
    return jnp.where(instant, t, jump_t), jnp.where(instant, s, jump_s), None


def shortcut_loss(
    u,
    x0,
    x1,
    t,
    s,
    lam,
    cond,
    null_cond,
    is_null,
    config: ShortcutConfig,
    *,
    num_instant: int,
    constrain=lambda tree: tree,
):
    """The shortcut loss: a jump of length 2d aims at two jumps of length d.

    u(x_t, t, t - 2d) at sg((u(x_t, t, t - d) + u(x', t - d, t - 2d)) / 2), with
    x' = x_t - d u(x_t, t, t - d). Where d is the finest length 1 / M, the instant velocity stands
    for the halves, which no row trains (the paper, section 3). The first `num_instant` rows aim at
    the guided velocity. Network evaluations, in forward passes over the batch with
    r = num_instant / B: the unconditional velocity of the s = t rows r, both halves of the others
    2 (1 - r), and the differentiated pass.

    Args, returns: as `vcm_loss`; `lam` is of no effect.
    """
    del lam
    t, s = map(common.at_least_float32, (t, s))
    at = lambda t, l: jnp.where(t - l < 1.5 / config.finest, t, l)
    return common.composed_loss(
        u, x0, x1, t, s, (t + s) / 2, cond, null_cond, is_null, config, num_instant, constrain, at
    )

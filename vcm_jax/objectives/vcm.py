"""Velocity consistency: the objective of SoundVCM (3.2, 3.3, Algorithm 1)."""

import dataclasses

import jax
import jax.numpy as jnp

from vcm_jax.guidance import mix_velocity, within
from vcm_jax.objectives import common
from vcm_jax.times import intermediate_time


@dataclasses.dataclass(frozen=True)
class VCMConfig:
    """Settings of the objective; the defaults are SoundVCM's S-16k run (section 4.3).

    For m the text says 0.75, but the headline results are the ablation's row of m = 0.25.

    Attributes:
      guidance_scale: w of eq. 15; 1 is no guidance.
      mix_ratio: m of eq. 16, in [0, 1]; 1 uses no prediction of the guided velocity.
      guidance_interval: times t, ends included, at which guidance and mixing apply.
      p, eps: of the adaptive weight, eq. 11; p = 0 is the plain mean squared error.

    Raises:
      ValueError: when a setting is out of its range.
    """

    guidance_scale: float = 4.0
    mix_ratio: float = 0.25
    guidance_interval: tuple[float, float] = (0.0, 0.8)
    p: float = 1.0
    eps: float = 0.01

    def __post_init__(self):
        low, high = self.guidance_interval
        for ok, message in (
            (self.guidance_scale >= 0, f"guidance_scale {self.guidance_scale} must be >= 0"),
            (0 <= self.mix_ratio <= 1, f"mix_ratio {self.mix_ratio} must be in [0, 1]"),
            (0 <= low <= high <= 1, f"guidance_interval {low, high} must be 0 <= low <= high <= 1"),
            (self.p >= 0, f"p {self.p} must be >= 0"),
            (self.eps > 0, f"eps {self.eps} must be > 0"),
        ):
            if not ok:
                raise ValueError(f"objective.{message}")


def vcm_loss(
    u,
    x0,
    x1,
    t,
    s,
    lam,
    cond,
    null_cond,
    is_null,
    config: VCMConfig,
    *,
    num_instant: int,
    constrain=lambda tree: tree,
):
    """The VCM loss of one batch (SoundVCM eq. 10, 11, 16; Algorithm 1).

    The first `num_instant` rows are trained at s = t: their target is the mixed velocity itself,
    and the prediction that is trained serves as their guided velocity. Network evaluations, in
    forward passes over the batch with r = num_instant / B: the unconditional velocity of all rows
    1, the guided velocity and the later average velocity of the s < t rows 2 (1 - r), and the
    differentiated pass. Where w = 1, or m is 0 or 1, the passes that have no effect are left out.

    Args:
      u: `u(x, t, s, cond)` -> `B N C`, the average velocity; called on slices of the rows.
      x0, x1: data and noise, `B N C`.
      t, s: times `B`, s = t in the first `num_instant` rows and s <= t - 1e-4 in the others.
      lam: scalar in (0, 1], how far l lies on the way from t to s (eq. 12).
      cond, null_cond: pytrees with a leading batch axis, conditions and empty conditions.
      is_null: bool `B`, rows whose whole condition is dropped; their target is plain x1 - x0's.
      config: settings.
      num_instant: how many rows have s = t, known to the compiler.
      constrain: applied to every pytree of sliced or joined rows and to the target: where the
        batch is sharded, it spreads them over the devices again.

    Returns:
      loss: scalar.
      aux: `mse` `B`, unweighted; `target` `B N C`; `velocity_mse` `num_instant`, of the instant
        velocity u(x_t, t, t, c) against x1 - x0, comparable across guidance settings.

    Raises:
      ValueError: when `num_instant` is not within the batch.
    """
    n, batch_size = num_instant, x0.shape[0]
    if not 0 <= n <= batch_size:
        raise ValueError(f"num_instant {n} is not within the batch of {batch_size} rows")
    x0, x1, t, s = map(common.at_least_float32, (x0, x1, t, s))
    sg = jax.lax.stop_gradient
    later = lambda tree: constrain(jax.tree.map(lambda a: a[n:], tree))

    x_t, v = common.noised(x0, x1, t), x1 - x0
    cond = common.select_rows(is_null, null_cond, cond)
    u_ts = common.at_least_float32(u(x_t, t, s, cond))

    v_uncond = v_guided = None
    if config.mix_ratio > 0 and config.guidance_scale != 1:
        v_uncond = sg(common.at_least_float32(u(x_t, t, t, null_cond)))
    x_later, t_later, s_later, cond_later = later((x_t, t, s, cond))
    if config.mix_ratio < 1:
        v_guided = sg(u_ts[:n])
        if n < batch_size:
            guided_later = sg(common.at_least_float32(u(x_later, t_later, t_later, cond_later)))
            v_guided = constrain(jnp.concatenate([v_guided, guided_later]))
    v_mix = mix_velocity(v, v_uncond, v_guided, config.guidance_scale, config.mix_ratio)
    guided = jnp.logical_and(within(t, config.guidance_interval), ~is_null)
    target = v_mix = common.select_rows(guided, v_mix, v)

    if n < batch_size:
        v_later = later(v_mix)
        l, lam = intermediate_time(t_later, s_later, lam)
        x_l = x_later + common.expand(l - t_later, x_later) * v_later
        u_ls = common.at_least_float32(u(x_l, l, s_later, cond_later))
        lam = common.expand(lam, x_l)
        target = constrain(jnp.concatenate([v_mix[:n], lam * v_later + (1 - lam) * u_ls]))

    target = sg(target)
    mse = common.mean_square(u_ts - target)
    loss = (common.adaptive_weight(mse, config.p, config.eps) * mse).mean()
    velocity_mse = common.mean_square(u_ts[:n] - v[:n])
    return loss, {"mse": mse, "target": target, "velocity_mse": velocity_mse}

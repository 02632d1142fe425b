"""Velocity consistency: the objective of SoundVCM (3.2, 3.3, Algorithm 1)."""

import dataclasses

import jax
import jax.numpy as jnp

from vcm_jax.objectives import common, times


@dataclasses.dataclass(frozen=True)
class VCMConfig:
    """Settings of the objective; the defaults are SoundVCM's S-16k run (section 4.3).

    For m the text says 0.75, but the headline results are the ablation's row of m = 0.25.

    Attributes:
      guidance_scale: w of eq. 15; 1 is no guidance.
      mix_ratio: m of eq. 16, in [0, 1]; 1 uses no prediction of the guided velocity.
      guidance_interval: times t, ends included, at which guidance and mixing apply.
      p, eps: of the adaptive weight, eq. 11; p = 0 is the plain mean squared error.
      instant_ratio: r, the part of the rows with s = t.
      lambda_init, lambda_end: of eq. 12.
      time_mean, time_std: mu and sigma of the logit-normal times.

    Raises:
      ValueError: when a setting is out of its range.
    """

    guidance_scale: float = 4.0
    mix_ratio: float = 0.25
    guidance_interval: tuple[float, float] = (0.0, 0.8)
    p: float = 1.0
    eps: float = 0.01
    instant_ratio: float = 0.75
    lambda_init: float = 1 / 10
    lambda_end: float = 1 / 500
    time_mean: float = -0.4
    time_std: float = 1.0

    def __post_init__(self):
        common.check_settings(self)


def draw(key, batch_size: int, num_instant: int, step, steps: int, config: VCMConfig):
    """t and s `B`, and the scalar lambda of the step, see `vcm_loss`."""
    t, s = times.sample_times(key, batch_size, num_instant, config.time_mean, config.time_std)
    return t, s, times.lambda_schedule(step, steps, config.lambda_init, config.lambda_end)


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
    common.check_rows(n, batch_size)
    x0, x1, t, s = map(common.at_least_float32, (x0, x1, t, s))
    u, later = common.wide(u), common.rows(n, None, constrain)

    x_t, v = common.noised(x0, x1, t), x1 - x0
    cond = common.select_rows(is_null, null_cond, cond)
    u_ts = u(x_t, t, s, cond)
    target = v_mix = common.guided_target(
        lambda x, t, c: u(x, t, t, c), u_ts[:n], x_t, v, t, cond, null_cond, is_null,
        scale=config.guidance_scale, mix_ratio=config.mix_ratio,
        interval=config.guidance_interval, constrain=constrain,
    )  # fmt: skip
    if n < batch_size:
        x_later, t_later, s_later, v_later, cond_later = later((x_t, t, s, v_mix, cond))
        l, lam = times.intermediate_time(t_later, s_later, lam)
        x_l = x_later + common.expand(l - t_later, x_later) * v_later
        u_ls = u(x_l, l, s_later, cond_later)
        lam = common.expand(lam, x_l)
        target = constrain(jnp.concatenate([v_mix[:n], lam * v_later + (1 - lam) * u_ls]))

    target = jax.lax.stop_gradient(target)
    mse = common.mean_square(u_ts - target)
    loss = (common.adaptive_weight(mse, config.p, config.eps) * mse).mean()
    velocity_mse = common.mean_square(u_ts[:n] - v[:n])
    return loss, {"mse": mse, "target": target, "velocity_mse": velocity_mse}

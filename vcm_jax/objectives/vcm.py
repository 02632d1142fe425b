"""Velocity consistency, the objective of SoundVCM (sections 3.2 and 3.3, Algorithm 1)."""

import dataclasses

import jax.numpy as jnp

from vcm_jax.objectives import common, times
from vcm_jax.objectives.base import GuidedObjective, Passes
from vcm_jax.objectives.guidance import guided_target
from vcm_jax.settings import number, setting


@dataclasses.dataclass(frozen=True)
class VCMConfig(GuidedObjective):
    """Settings of the objective; the defaults are those of SoundVCM's S-16k run (section 4.3).

    The text of the paper gives 0.75 for m, but the headline results are those of the ablation with
    m = 0.25, the default here.

    Attributes:
      guidance_scale, mix_ratio, guidance_interval, p, eps, instant_ratio, time_mean, time_std: see
        `GuidedObjective`.
      lambda_init, lambda_end: lambda of eq. 12 at the first and at the last step.
    """

    name = "vcm"
    lambda_init: float = setting(1 / 10, number(above=0, high=1))
    lambda_end: float = setting(1 / 500, number(above=0, high=1))

    def loss(self, u, *batch, **options):
        return vcm_loss(u, *batch, self, **options)

    def passes(self) -> Passes:
        later = 1 - self.instant_ratio
        return Passes(self.guided_passes(self.instant_ratio, later), elsewhere=later)

    def draw(self, key, batch_size: int, num_instant: int, step, steps: int):
        """t and s `B`, and the scalar lambda of the step (eq. 12)."""
        t, s, _ = super().draw(key, batch_size, num_instant, step, steps)
        return t, s, times.lambda_schedule(step, steps, self.lambda_init, self.lambda_end)


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
    constrain=common.identity,
    guidance=None,
    target_u=None,
):
    """The VCM loss of one batch (SoundVCM eq. 10, 11, 16; Algorithm 1).

    u(x_t, t, s) is trained towards lam v_mix + (1 - lam) u(x_l, l, s), where l lies between t and
    s, and x_l = x_t + (l - t) v_mix. The first `num_instant` rows have s = t: their target is
    v_mix itself, and the prediction that is trained serves as their guided velocity.

    Network evaluations, in forward passes over the batch with r = num_instant / B: the
    unconditional velocity of all rows 1, the guided velocity and u(x_l, l, s) of the s < t rows
    2 (1 - r), and the differentiated pass. Passes that have no effect are left out: where w = 1,
    or m is 0 or 1.

    Args:
      u: `u(x, t, s, cond)` -> `B N C`, the average velocity; it is called on slices of the rows.
      x0, x1: data and noise, `B N C`.
      t, s: times `B`; s = t in the first `num_instant` rows, and s <= t - 1e-4 in the others.
      lam: scalar in (0, 1], the fraction of the way from t to s at which l lies (eq. 12).
      cond, null_cond: pytrees with a leading batch axis, conditions and empty conditions.
      is_null: bool `B`, rows whose whole condition is dropped; they are trained towards x1 - x0.
      config: settings.
      num_instant: the number of rows with s = t, known at compilation.
      constrain: applied to every pytree of sliced or joined rows and to the target; where the
        batch is sharded, it spreads them over the devices again.
      guidance: `Guidance` of each row, which `cond` tells the network; None for the fixed guidance
        of `config`.
      target_u: the network with other parameters, for all passes of the targets; None takes `u`.

    Returns:
      loss: scalar.
      aux: `mse` `B`, unweighted; `target` `B N C`; `velocity_mse` `num_instant`, of the
        instantaneous velocity u(x_t, t, t, c) against x1 - x0, comparable between guidance
        settings.

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
    target_u, known = common.for_targets(u, target_u, u_ts[:n])
    target = v_mix = guided_target(
        target_u,
        known,
        x_t,
        v,
        t,
        cond,
        null_cond,
        is_null,
        scale=config.scale(guidance),
        mix_ratio=config.mix_ratio,
        interval=config.interval(guidance),
        constrain=constrain,
    )
    if n < batch_size:
        x_later, t_later, s_later, v_later, cond_later = later((x_t, t, s, v_mix, cond))
        l, lam = times.intermediate_time(t_later, s_later, lam)
        x_l = x_later + common.expand(l - t_later, x_later) * v_later
        u_ls = target_u(x_l, l, s_later, cond_later)
        lam = common.expand(lam, x_l)
        target = constrain(jnp.concatenate([v_mix[:n], lam * v_later + (1 - lam) * u_ls]))
    return common.regression(u_ts, target, v, n, config.p, config.eps)

"""MeanFlow: the average velocity by its differential identity (Geng et al. 2025)."""

import dataclasses

import jax
import jax.numpy as jnp

from vcm_jax.objectives import common
from vcm_jax.objectives.base import Passes, TargetGuidance
from vcm_jax.objectives.guidance import guided_target
from vcm_jax.settings import TIME_INTERVAL, number, setting


@dataclasses.dataclass(frozen=True)
class MeanFlowConfig(TargetGuidance):
    """Settings of the objective; the defaults are the paper's on ImageNet.

    Attributes:
      omega, kappa: of the guided velocity (eq. 20 of the paper):
        omega v + kappa u(x_t, t, t, c) + (1 - omega - kappa) u(x_t, t, t, null). The effective
        guidance scale is omega / (1 - kappa), which is 2 by default; conditioned guidance draws it,
        and omega is then (1 - kappa) w.
      guidance, guidance_max: see `TargetGuidance`.
      guidance_interval: times t, both ends included, at which guidance applies.
      p, eps: of the adaptive weight; they act on the squared error *summed* over N and C.
      instant_ratio: the fraction of the rows with s = t.
      time_mean, time_std: mu and sigma of the logit-normal times.
    """

    name = "meanflow"
    needs_jvp = True
    omega: float = setting(1.0, number(0))
    kappa: float = setting(0.5, number(0, below=1))
    guidance_interval: tuple[float, float] = setting((0.0, 1.0), TIME_INTERVAL)
    p: float = setting(1.0, number(0))
    eps: float = setting(0.01, number(above=0))
    instant_ratio: float = setting(0.75, number(0, 1))
    time_mean: float = setting(-0.4, number())
    time_std: float = setting(1.0, number(above=0))

    @property
    def guidance_scale(self) -> float:
        """w for which SoundVCM's mix (eq. 16) is MeanFlow's guided velocity, with m = 1 - kappa."""
        return self.omega / (1 - self.kappa)

    def loss(self, u, *batch, **options):
        return meanflow_loss(u, *batch, self, **options)

    def passes(self) -> Passes:
        later = 1 - self.instant_ratio
        guidance = self.guides + later * (self.kappa > 0)
        return Passes(at_x_t=guidance, elsewhere=later)


def meanflow_loss(
    u,
    x0,
    x1,
    t,
    s,
    lam,
    cond,
    null_cond,
    is_null,
    config: MeanFlowConfig,
    *,
    num_instant: int,
    constrain=common.identity,
    guidance=None,
):
    """The MeanFlow loss: u is trained towards sg(v_g - (t - s) d/dt u(x_t, t, s)).

    The derivative is taken along the guided velocity v_g. The first `num_instant` rows have s = t:
    they need no derivative, and their prediction serves as their conditional velocity.

    Network evaluations, in forward passes over the batch with r = num_instant / B: the
    unconditional velocity of all rows 1, the conditional one of the s < t rows (1 - r), the tangent
    of their prediction (1 - r), and the differentiated pass, which includes the prediction of the
    JVP. Passes that have no effect (omega + kappa = 1, kappa = 0) are left out.

    Arguments and results are those of `vcm_loss`; `lam` has no effect. `aux["mse"]` is the mean
    over N and C.

    Raises:
      ValueError: when `num_instant` is not within the batch.
    """
    del lam
    n, batch_size = num_instant, x0.shape[0]
    common.check_rows(n, batch_size)
    x0, x1, t, s = map(common.at_least_float32, (x0, x1, t, s))
    u = common.wide(u)
    first, later = common.rows(0, n, constrain), common.rows(n, None, constrain)

    x_t, v = common.noised(x0, x1, t), x1 - x0
    cond = common.select_rows(is_null, null_cond, cond)
    predicted = x_t[:0]
    if n:
        x_first, t_first, cond_first = first((x_t, t, cond))
        predicted = u(x_first, t_first, t_first, cond_first)
    target = v_g = guided_target(
        u,
        predicted,
        x_t,
        v,
        t,
        cond,
        null_cond,
        is_null,
        scale=config.scale(guidance),
        mix_ratio=1 - config.kappa,
        interval=config.interval(guidance),
        constrain=constrain,
    )
    if n < batch_size:
        x_later, t_later, s_later, v_later, cond_later = later((x_t, t, s, v_g, cond))

        def along(x, t):
            return u(x, t, s_later, cond_later)

        tangents = (v_later, jnp.ones_like(t_later))
        u_later, slope = jax.jvp(along, (x_later, t_later), tangents)
        gap = common.expand(jnp.clip(t_later - s_later, 0, 1), slope)
        target = constrain(jnp.concatenate([v_g[:n], v_later - gap * slope]))
        predicted = constrain(jnp.concatenate([predicted, u_later]))

    target = jax.lax.stop_gradient(target)
    mse = common.mean_square(predicted - target)
    elements = x0[0].size
    weight = common.adaptive_weight(elements * mse, config.p, config.eps)
    loss = (weight * elements * mse).mean()
    velocity_mse = common.mean_square(predicted[:n] - v[:n])
    return loss, {"mse": mse, "target": target, "velocity_mse": velocity_mse}

"""Improved MeanFlow: a regression on the velocity itself (arXiv 2512.02012, 2025)."""

import dataclasses

import jax
import jax.numpy as jnp

from vcm_jax.objectives import common, flow_maps
from vcm_jax.objectives.base import Passes, TargetGuidance
from vcm_jax.objectives.guidance import mix_velocity, within
from vcm_jax.settings import TIME_INTERVAL, choice, number, setting


@dataclasses.dataclass(frozen=True)
class ImprovedMeanFlowConfig(flow_maps.TimeDerivative, TargetGuidance):
    """Settings of the objective; the defaults are the paper's, guidance as an input included.

    The paper's network has a second head for the instantaneous velocity; here that is u(x, t, t),
    the paper's simpler variant. The interval of s = t rows is drawn like that of the others, where
    the paper's code takes [0, 1].

    Attributes:
      guidance, guidance_max, target_ema: see `TargetGuidance`.
      guidance_scale: w, by default of sampling; with fixed guidance also of training.
      guidance_interval: times t, both ends included, at which guidance applies.
      p, eps: of the adaptive weight; they act on the squared error *summed* over N and C.
      instant_ratio: the fraction of the rows with s = t.
      time_mean, time_std: mu and sigma of the logit-normal times.
      derivative, derivative_step: see `flow_maps.TimeDerivative`.
    """

    name = "improved_meanflow"
    guidance: str = setting("conditioned", choice("fixed", "conditioned"))
    guidance_scale: float = setting(2.0, number(1))
    guidance_interval: tuple[float, float] = setting((0.0, 1.0), TIME_INTERVAL)
    p: float = setting(1.0, number(0))
    eps: float = setting(0.01, number(above=0))
    instant_ratio: float = setting(0.5, number(0, 1))
    time_mean: float = setting(-0.4, number())
    time_std: float = setting(1.0, number(above=0))

    def loss(self, u, *batch, **options):
        return improved_meanflow_loss(u, *batch, self, **options)

    def passes(self) -> Passes:
        later = 1 - self.instant_ratio
        own = self.guides * self.instant_ratio * (self.target_ema > 0)
        return Passes(at_x_t=self.guides + later + own, elsewhere=later * self.derivative_passes)


def improved_meanflow_loss(
    u,
    x0,
    x1,
    t,
    s,
    lam,
    cond,
    null_cond,
    is_null,
    config: ImprovedMeanFlowConfig,
    *,
    num_instant: int,
    constrain=common.identity,
    guidance=None,
    target_u=None,
):
    """The improved MeanFlow loss: V = u + (t - s) sg(d/dt u) is trained towards the velocity.

    The derivative is taken along the network's own velocity v_c = sg u(x_t, t, t, c), so that what
    is trained is a function of x_t alone, and the target v_g = v + (1 - 1/w) (v_c - v_u), with
    v_u = sg u(x_t, t, t, null), holds no derivative. V is the velocity exactly where u satisfies
    MeanFlow's identity.

    Network evaluations, in forward passes over the batch with r = num_instant / B: v_u of all rows
    1, v_c of the s < t rows (1 - r), the tangent of their prediction (1 - r), and the
    differentiated pass. v_u is left out where w = 1.

    Arguments and results are those of `vcm_loss`; `lam` has no effect. `aux["mse"]` is the mean
    over N and C.
    """
    del lam
    n = num_instant
    common.check_rows(n, x0.shape[0])
    x0, x1, t, s = map(common.at_least_float32, (x0, x1, t, s))
    u, sg = common.wide(u), jax.lax.stop_gradient
    first, later = common.rows(0, n, constrain), common.rows(n, None, constrain)
    x_t, v = common.noised(x0, x1, t), x1 - x0
    cond = common.select_rows(is_null, null_cond, cond)
    target_net = u if target_u is None else common.wide(target_u)
    predicted = v_own = x_t[:0]
    if n:
        x_first, t_first, cond_first = first((x_t, t, cond))
        predicted = v_own = u(x_first, t_first, t_first, cond_first)
        if target_u is not None and config.guides:
            v_own = target_net(x_first, t_first, t_first, cond_first)
    velocity = predicted
    if n < x0.shape[0]:
        x_, t_, s_, cond_ = later((x_t, t, s, cond))
        v_later = sg(target_net(x_, t_, t_, cond_))
        v_own = constrain(jnp.concatenate([sg(v_own), v_later]))
        u_later, slope = flow_maps.along_flow(u, x_, t_, s_, cond_, v_later, config)
        gap = common.expand(t_ - s_, slope)
        velocity = constrain(jnp.concatenate([predicted, u_later + gap * sg(slope)]))
    target = v
    if config.guides:
        w = config.scale(guidance)
        w = common.expand(w, v) if getattr(w, "ndim", 0) else w
        v_null = sg(target_net(x_t, t, t, null_cond))
        mixed = mix_velocity(v, v_null, sg(v_own), w, 1 / w)
        applies = within(t, config.interval(guidance)) & ~is_null
        target = common.select_rows(applies, mixed, v)
    target = sg(target)
    mse = common.mean_square(velocity - target)
    elements = v[0].size
    weight = common.adaptive_weight(elements * mse, config.p, config.eps)
    velocity_mse = common.mean_square(predicted - v[:n])
    aux = {"mse": mse, "target": target, "velocity_mse": velocity_mse}
    return (weight * elements * mse).mean(), aux

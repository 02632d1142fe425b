"""MeanFlow: the average velocity by its differential identity (Geng et al. 2025)."""

import dataclasses

import jax
import jax.numpy as jnp

from vcm_jax.objectives import common
from vcm_jax.objectives.flow_matching import draw as draw  # pairs of times, and no lambda


@dataclasses.dataclass(frozen=True)
class MeanFlowConfig:
    """Settings of the objective; the defaults are the paper's on ImageNet.

    Attributes:
      omega, kappa: of the guided velocity (eq. 20 of the paper):
        omega v + kappa u(x_t, t, t, c) + (1 - omega - kappa) u(x_t, t, t, null). The effective
        guidance scale is omega / (1 - kappa), here 2.
      guidance_interval: times t, ends included, at which guidance applies.
      p, eps: of the adaptive weight; they act on the squared error *summed* over N and C.
      instant_ratio: the part of the rows with s = t.
      time_mean, time_std: mu and sigma of the logit-normal times.

    Raises:
      ValueError: when a setting is out of its range.
    """

    omega: float = 1.0
    kappa: float = 0.5
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    p: float = 1.0
    eps: float = 0.01
    instant_ratio: float = 0.75
    time_mean: float = -0.4
    time_std: float = 1.0

    def __post_init__(self):
        common.check_settings(
            self,
            omega=(lambda omega: omega >= 0, "must be >= 0"),
            kappa=(lambda kappa: 0 <= kappa < 1, "must be in [0, 1)"),
        )


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
    constrain=lambda tree: tree,
):
    """The MeanFlow loss: u aims at sg(v_g - (t - s) d/dt u(x_t, t, s)), the derivative along v_g.

    The first `num_instant` rows have s = t: no derivative is taken there, and their prediction
    serves as their conditional velocity. Network evaluations, in forward passes over the batch
    with r = num_instant / B: the unconditional velocity of all rows 1, the conditional one of the
    s < t rows (1 - r), the tangent of their prediction (1 - r), and the differentiated pass,
    which the prediction of the JVP is part of. Passes without effect (omega + kappa = 1,
    kappa = 0) are left out.

    Args, returns: as `vcm_loss`; `lam` is of no effect. `aux["mse"]` is the mean over N and C.

    Raises:
      ValueError: when `num_instant` is not within the batch.
    """
    del lam
    n, batch_size = num_instant, x0.shape[0]
    common.check_rows(n, batch_size)
    x0, x1, t, s = map(common.at_least_float32, (x0, x1, t, s))
    sg, u = jax.lax.stop_gradient, common.wide(u)
    first, later = common.rows(0, n, constrain), common.rows(n, None, constrain)

    x_t, v = common.noised(x0, x1, t), x1 - x0
    cond = common.select_rows(is_null, null_cond, cond)
    velocity = lambda x, t, c: u(x, t, t, c)
    predicted = velocity(*first((x_t, t, cond))) if n else x_t[:0]
    # omega v + kappa u_c + (1 - omega - kappa) u_null is SoundVCM's mix with m = 1 - kappa.
    target = v_g = common.guided_target(
        velocity, predicted, x_t, v, t, cond, null_cond, is_null,
        scale=config.omega / (1 - config.kappa), mix_ratio=1 - config.kappa,
        interval=config.guidance_interval, constrain=constrain,
    )  # fmt: skip
    if n < batch_size:
        x_later, t_later, s_later, v_later, cond_later = later((x_t, t, s, v_g, cond))
        along = lambda x, t: u(x, t, s_later, cond_later)
        tangents = (v_later, jnp.ones_like(t_later))
        u_later, slope = jax.jvp(along, (x_later, t_later), tangents)
        gap = common.expand(jnp.clip(t_later - s_later, 0, 1), slope)
        target = constrain(jnp.concatenate([v_g[:n], v_later - gap * slope]))
        predicted = constrain(jnp.concatenate([predicted, u_later]))

    target = sg(target)
    mse = common.mean_square(predicted - target)
    elements = x0[0].size
    weight = common.adaptive_weight(elements * mse, config.p, config.eps)
    loss = (weight * elements * mse).mean()
    velocity_mse = common.mean_square(predicted[:n] - v[:n])
    return loss, {"mse": mse, "target": target, "velocity_mse": velocity_mse}

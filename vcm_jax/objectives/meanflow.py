"""MeanFlow: the average velocity by its differential identity (Geng et al. 2025)."""

import dataclasses

import jax.numpy as jnp

from vcm_jax.objectives import common, flow_maps
from vcm_jax.objectives.base import Passes, TargetGuidance
from vcm_jax.settings import TIME_INTERVAL, number, setting


@dataclasses.dataclass(frozen=True)
class MeanFlowConfig(flow_maps.TimeDerivative, TargetGuidance):
    """Settings of the objective; the defaults are the paper's on ImageNet.

    Attributes:
      omega, kappa: of the guided velocity (eq. 20 of the paper):
        omega v + kappa u(x_t, t, t, c) + (1 - omega - kappa) u(x_t, t, t, null). The effective
        guidance scale is omega / (1 - kappa), which is 2 by default; conditioned guidance draws it,
        and omega is then (1 - kappa) w.
      guidance, guidance_max, target_ema: see `TargetGuidance`.
      guidance_interval: times t, both ends included, at which guidance applies.
      p, eps: of the adaptive weight; they act on the squared error *summed* over N and C.
      instant_ratio: the fraction of the rows with s = t.
      time_mean, time_std: mu and sigma of the logit-normal times.
      derivative, derivative_step: see `flow_maps.TimeDerivative`.
    """

    name = "meanflow"
    omega: float = setting(1.0, number(0))
    kappa: float = setting(0.5, number(0, below=1))
    guidance_interval: tuple[float, float] = setting((0.0, 1.0), TIME_INTERVAL)
    p: float = setting(1.0, number(0))
    eps: float = setting(0.01, number(above=0))
    instant_ratio: float = setting(0.75, number(0, 1))
    time_mean: float = setting(-0.4, number())
    time_std: float = setting(1.0, number(above=0))

    @property
    def mix_ratio(self) -> float:
        """m of SoundVCM's mix."""
        return 1 - self.kappa

    @property
    def guidance_scale(self) -> float:
        """w for which SoundVCM's mix (eq. 16) is MeanFlow's guided velocity, with m = 1 - kappa."""
        return self.omega / (1 - self.kappa)

    def loss(self, u, *batch, **options):
        return meanflow_loss(u, *batch, self, **options)

    def passes(self) -> Passes:
        later = 1 - self.instant_ratio
        guidance = self.guided_passes(self.instant_ratio, later)
        return Passes(at_x_t=guidance, elsewhere=later * self.derivative_passes)


def meanflow_loss(
    u, x0, x1, t, s, lam, cond, null_cond, is_null, config: MeanFlowConfig, **options
):
    """The MeanFlow loss: u is trained towards sg(v_g - (t - s) d/dt u(x_t, t, s)).

    The derivative is taken along the guided velocity v_g. The first `num_instant` rows have s = t:
    they need no derivative, and their prediction serves as their conditional velocity.

    Network evaluations, in forward passes over the batch with r = num_instant / B: the
    unconditional velocity of all rows 1, the conditional one of the s < t rows (1 - r), the tangent
    of their prediction (1 - r; a central difference takes two passes instead), and the
    differentiated pass, which includes the prediction of the JVP. Passes that have no effect
    (omega + kappa = 1, kappa = 0) are left out.

    Arguments and results are those of `vcm_loss`; `lam` has no effect. `aux["mse"]` is the mean
    over N and C.

    Raises:
      ValueError: when `num_instant` is not within the batch.
    """
    batch = (x0, x1, t, s, lam, cond, null_cond, is_null)
    begun = flow_maps.begin(u, batch, config, **options)
    predicted = target = None
    if begun.has_jumps:
        predicted, target = eulerian(begun, config)
    return flow_maps.finish(begun, predicted, target, config, total=True)


def eulerian(begun: flow_maps.Begun, config: flow_maps.TimeDerivative):
    """u of the s < t rows, and their target v_g - (t - s) d/dt u along v_g."""
    x, t, s, v = begun.x, begun.t, begun.s, begun.v_later
    predicted, slope = flow_maps.along_flow(begun.u, x, t, s, begun.cond, v, config)
    return predicted, v - common.expand(jnp.clip(t - s, 0, 1), slope) * slope

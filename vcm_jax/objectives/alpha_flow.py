"""alpha-Flow: from flow matching to MeanFlow on a schedule (arXiv 2510.20771, 2025)."""

import dataclasses

import jax
import jax.numpy as jnp

from vcm_jax.objectives import common, flow_maps, times
from vcm_jax.objectives.base import GuidedObjective, Passes
from vcm_jax.objectives.meanflow import eulerian
from vcm_jax.settings import TIME_INTERVAL, choice, number, setting

_NEAR = 0.005  # alpha this near to 0 or 1 is 0 or 1, as in the paper's code


@dataclasses.dataclass(frozen=True)
class AlphaFlowConfig(flow_maps.TimeDerivative, GuidedObjective):
    """Settings of the objective; the defaults are those of the paper's B/2 run with guidance.

    The paper writes the guided velocity with omega = 1 and kappa = 0.5, which is w = 2 and m = 0.5
    here. Its schedule is one over steps; here it is one over fractions of the run.

    Attributes:
      guidance, guidance_max, target_ema, guidance_scale, mix_ratio, guidance_interval, p, eps,
        instant_ratio, time_mean, time_std: see `GuidedObjective`.
      derivative, derivative_step: of the last phase, see `flow_maps.TimeDerivative`.
      alpha_start, alpha_end: fractions of the run; alpha is 1 before the first and 0 after the
        second.
      alpha_slope: gamma, the steepness of the sigmoid in between.
      clamp: bound of the target while 0 < alpha; 0 is none (the paper's XL/2 run has 4).
      reduction: whether the adaptive weight and the loss take the "mean" (the paper's) or the
        "sum" (MeanFlow's) of the squared error.
    """

    name = "alpha_flow"
    guidance_scale: float = setting(2.0, number(0))
    mix_ratio: float = setting(0.5, number(0, 1))
    guidance_interval: tuple[float, float] = setting((0.0, 1.0), TIME_INTERVAL)
    eps: float = setting(1e-3, number(above=0))
    instant_ratio: float = setting(0.25, number(0, 1))
    alpha_start: float = setting(0.0, number(0, 1))
    alpha_end: float = setting(1.0, number(0, 1))
    alpha_slope: float = setting(25.0, number(above=0))
    clamp: float = setting(0.0, number(0))
    reduction: str = setting("mean", choice("mean", "sum"))

    def __post_init__(self):
        super().__post_init__()
        if self.alpha_start > self.alpha_end:
            raise ValueError(
                f"objective.alpha_start {self.alpha_start} is after objective.alpha_end "
                f"{self.alpha_end}: alpha falls from 1 to 0 between them"
            )

    def loss(self, u, *batch, **options):
        return alpha_flow_loss(u, batch, self, **options)

    def passes(self) -> Passes:
        """Those before alpha is 0; after that, the s < t rows have one pass more."""
        later = 1 - self.instant_ratio
        guidance = self.guided_passes(self.instant_ratio, later)
        return Passes(at_x_t=guidance, elsewhere=later)

    def draw(self, key, batch_size: int, num_instant: int, step, steps: int):
        """t and s `B`, and the scalar alpha of the step."""
        t, s, _ = super().draw(key, batch_size, num_instant, step, steps)
        return t, s, self.alpha(step, steps)

    def alpha(self, step, steps: int):
        """1 - sigmoid(gamma (k / K - centre) / (end - start)), and 1 and 0 outside, float32."""
        at = jnp.asarray(step, jnp.float32) / steps
        start, end = self.alpha_start, self.alpha_end
        width = max(end - start, 1e-6)
        alpha = jax.nn.sigmoid(-self.alpha_slope * (at - (start + end) / 2) / width)
        alpha = jnp.where((at < start) | (alpha > 1 - _NEAR), 1.0, alpha)
        return jnp.where((at > end) | (alpha < _NEAR), 0.0, alpha)


def alpha_flow_loss(u, batch, config: AlphaFlowConfig, **options):
    """The alpha-Flow loss: VCM's target with alpha in place of lambda, which ends in MeanFlow's.

    With l = t + alpha (s - t) and x_l = x_t + (l - t) v_g, u(x_t, t, s) is trained towards
    alpha v_g + (1 - alpha) u(x_l, l, s), with the further weight alpha. For alpha = 1 that is flow
    matching at every s. For alpha = 0 it is MeanFlow, with its derivative and without that weight.

    Network evaluations, in forward passes over the batch with r = num_instant / B: those of
    `flow_maps.begin`, the differentiated pass, and u(x_l, l, s) (1 - r) or, at alpha = 0, the JVP
    or the central difference (2 - 2 r).

    `batch` and `options` are the arguments of `vcm_loss`, and results are as its own; `lam` is
    alpha, a scalar in [0, 1]. Where it is not known at compilation, both targets are compiled and
    one of them is run.
    """
    begun = flow_maps.begin(u, batch, config, **options)
    alpha, total = begun.lam, config.reduction == "sum"
    if not begun.has_jumps:
        return flow_maps.finish(begun, None, None, config, total=total)

    x, t, s, v = begun.x, begun.t, begun.s, begun.v_later

    def discrete():
        l, fraction = times.intermediate_time(t, s, alpha)
        fraction = common.expand(fraction, x)
        u_ls = begun.target_u(x + common.expand(l - t, x) * v, l, s, begun.cond)
        target = fraction * v + (1 - fraction) * u_ls
        target = jnp.clip(target, -config.clamp, config.clamp) if config.clamp else target
        return jax.lax.stop_gradient(target)

    def derivative():
        return jax.lax.stop_gradient(eulerian(begun, config)[1])

    # The trained pass stays outside of the condition: what it keeps for the gradient would
    # otherwise be written for both phases in each step.
    predicted = begun.u(x, t, s, begun.cond)
    if isinstance(alpha, int | float):
        target = discrete() if alpha > 0 else derivative()
    else:
        target = jax.lax.cond(alpha > 0, discrete, derivative)
    weight = jnp.where(alpha > 0, alpha, 1.0) * jnp.ones_like(begun.t)
    return flow_maps.finish(begun, predicted, target, config, total=total, weight=weight)

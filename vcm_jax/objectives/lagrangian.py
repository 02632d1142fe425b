"""Lagrangian self-distillation, and terminal velocity matching as its settings.

"LSD" is that of Boffi, Albergo and Vanden-Eijnden (arXiv 2505.18825, 2025), "TVM" that of arXiv
2511.19797 (2025).
"""

import dataclasses

import jax
import jax.numpy as jnp

from vcm_jax.objectives import common, flow_maps
from vcm_jax.objectives.base import GuidedObjective, Passes
from vcm_jax.settings import BOOLEAN, TIME_INTERVAL, choice, number, setting


@dataclasses.dataclass(frozen=True)
class LagrangianConfig(flow_maps.TimeDerivative, GuidedObjective):
    """Settings of the objective.

    The loss has no adaptive weight by default, as in both papers. The s = t rows are flow matching
    on times of their own. `times="gap"` with time_mean -0.4, time_std 1, instant_ratio 0.5 and
    target_ema 0.99 are TVM's. What TVM changes in the network (normalised modulations, a spectral
    initialisation of the time embedding, an output that is multiplied by w) is not here.

    Attributes:
      guidance, guidance_max, target_ema, guidance_scale, mix_ratio, guidance_interval, p, eps,
        instant_ratio, time_mean, time_std: see `GuidedObjective`.
      derivative, derivative_step: of d/ds u, see `flow_maps.TimeDerivative`.
      double_backward: whether the gradient goes through d/ds u, too, as in both papers.
      times: how t and s of the s < t rows are drawn: "sorted" pairs of logit-normal times, or
        "gap", where t - s = sigmoid(normal(gap_mean, gap_std)) and s is logit-normal below 1 - gap.
      gap_mean, gap_std: of that gap.
    """

    name = "lagrangian"
    guidance_scale: float = setting(2.0, number(0))
    mix_ratio: float = setting(1.0, number(0, 1))
    guidance_interval: tuple[float, float] = setting((0.0, 1.0), TIME_INTERVAL)
    p: float = setting(0.0, number(0))
    # Its jumps learn from the network alone: without rows with s = t, zero would be a solution.
    instant_ratio: float = setting(0.5, number(above=0, high=1))
    double_backward: bool = setting(True, BOOLEAN)
    times: str = setting("sorted", choice("sorted", "gap"))
    gap_mean: float = setting(-0.8, number())
    gap_std: float = setting(1.0, number(above=0))

    def loss(self, u, *batch, **options):
        return lagrangian_loss(u, batch, self, **options)

    def passes(self) -> Passes:
        later = 1 - self.instant_ratio
        guidance = self.guided_passes(self.instant_ratio, 0)
        through = 2 * self.derivative_passes * later * self.double_backward
        return Passes(guidance, later * (1 + self.derivative_passes), 2.0 + through)

    def draw(self, key, batch_size: int, num_instant: int, step, steps: int):
        """t and s `B`; lam is None."""
        t, s, _ = super().draw(key, batch_size, num_instant, step, steps)
        if self.times == "gap":
            instant = jnp.arange(batch_size) < num_instant
            jump_t, jump_s = gap_times(jax.random.fold_in(key, 1), batch_size, self)
            t, s = jnp.where(instant, t, jump_t), jnp.where(instant, s, jump_s)
        return t, s, None


def gap_times(key, size: int, config: LagrangianConfig):
    """t and s `B` from their difference; s is a logit-normal time truncated to [0, 1 - gap]."""
    gap_key, key = jax.random.split(key)
    gap = jax.nn.sigmoid(config.gap_mean + config.gap_std * jax.random.normal(gap_key, (size,)))
    gap = jnp.clip(gap, 1e-4, 1 - 1e-4)
    # The inverse of the distribution function, at a uniform fraction of what is below 1 - gap.
    highest = (jnp.log1p(-gap) - jnp.log(gap) - config.time_mean) / config.time_std
    below = jax.scipy.stats.norm.cdf(highest) * jax.random.uniform(key, (size,), minval=1e-6)
    s = jax.nn.sigmoid(config.time_mean + config.time_std * jax.scipy.stats.norm.ppf(below))
    s = jnp.clip(s, 0, 1 - gap)
    return s + gap, s


def lagrangian_loss(u, batch, config: LagrangianConfig, **options):
    """Where a jump lands it must move with the velocity there: d/ds f(x_t, t, s) = u(f, s, s).

    In the s < t rows u + (s - t) d/ds u(x_t, t, s) is trained towards sg u(f, s, s), where
    f = x_t + (s - t) u. The derivative leaves x alone. The s = t rows are trained towards the
    guided velocity.

    Network evaluations, in forward passes over the batch with r = num_instant / B: the
    unconditional velocity of the s = t rows r, the derivative (1 - r; a central difference takes
    two passes), u(f, s, s) (1 - r), and the differentiated pass. A double backward pass costs twice
    as much as the derivative again.

    `batch` and `options` are the arguments of `vcm_loss`, and results are as its own; `lam` has no
    effect.
    """
    begun = flow_maps.begin(u, batch, config, guide_jumps=False, **options)
    predicted = target = None
    if begun.has_jumps:
        x, t, s, c = begun.x, begun.t, begun.s, begun.cond
        u_ts, slope = flow_maps.by_end(begun.u, x, t, s, c, config)
        slope = slope if config.double_backward else jax.lax.stop_gradient(slope)
        predicted = u_ts + common.expand(s - t, x) * slope
        landed = jax.lax.stop_gradient(flow_maps.jump(u_ts, x, t, s))
        target = begun.field(landed, s)
    return flow_maps.finish(begun, predicted, target, config)

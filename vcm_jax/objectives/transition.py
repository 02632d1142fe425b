"""Transition models: MeanFlow's identity by central differences (TiM, arXiv 2509.04394, 2025)."""

import dataclasses

import jax
import jax.numpy as jnp

from vcm_jax.objectives import common, flow_maps
from vcm_jax.objectives.base import GuidedObjective, Passes
from vcm_jax.settings import TIME_INTERVAL, choice, number, setting


@dataclasses.dataclass(frozen=True)
class TransitionConfig(flow_maps.TimeDerivative, GuidedObjective):
    """Settings of the objective; the defaults are those of the paper's ImageNet run.

    Its guided velocity v + 0.75 (u_c - u_null) has w = 4 and m = 0.25. The paper takes both u from
    EMA weights (`target_ema=0.9999`). Its loss on features of another network is not here.

    Attributes:
      guidance, guidance_max, target_ema, guidance_scale, mix_ratio, guidance_interval, p, eps,
        instant_ratio, time_mean, time_std: see `GuidedObjective`.
      derivative, derivative_step: see `flow_maps.TimeDerivative`.
      along: the velocity of the derivative: "sample" is x1 - x0, the paper's, so that the
        difference is one between noised versions of the same pair; "guided" is the target velocity,
        with which the guided flow is exactly what leaves no error.
      data_ratio: the fraction of the s < t rows with s = 0.
    """

    name = "transition"
    guidance_interval: tuple[float, float] = setting((0.3, 0.8), TIME_INTERVAL)
    eps: float = setting(1e-5, number(above=0))
    instant_ratio: float = setting(0.5, number(0, 1))
    derivative: str = setting("central", choice("jvp", "central"))
    along: str = setting("sample", choice("sample", "guided"))
    data_ratio: float = setting(0.2, number(0, 1))

    def loss(self, u, *batch, **options):
        return transition_loss(u, batch, self, **options)

    def passes(self) -> Passes:
        later = 1 - self.instant_ratio
        guidance = self.guided_passes(self.instant_ratio, later)
        return Passes(at_x_t=guidance, elsewhere=later * self.derivative_passes)

    def draw(self, key, batch_size: int, num_instant: int, step, steps: int):
        """t and s `B`; s is 0 in some of the s < t rows; lam is None."""
        t, s, _ = super().draw(key, batch_size, num_instant, step, steps)
        to_data = jax.random.bernoulli(jax.random.fold_in(key, 1), self.data_ratio, (batch_size,))
        return t, jnp.where(to_data & (jnp.arange(batch_size) >= num_instant), 0.0, s), None


def transition_loss(u, batch, config: TransitionConfig, **options):
    """u is trained towards sg(v_g - (t - s) d/dt u), weighted by 1 / sqrt(tan t - tan s + 1).

    The adaptive weight takes the mean squared error.

    Network evaluations, in forward passes over the batch with r = num_instant / B: those of
    `flow_maps.begin`, the central difference 2 (1 - r), and the differentiated pass.

    `batch` and `options` are the arguments of `vcm_loss`, and results are as its own; `lam` has no
    effect.
    """
    begun = flow_maps.begin(u, batch, config, **options)
    predicted = target = weight = None
    if begun.has_jumps:
        x, t, s, v = begun.x, begun.t, begun.s, begun.v_later
        way = v if config.along == "guided" else begun.v[begun.num_instant :]
        predicted, slope = flow_maps.along_flow(begun.u, x, t, s, begun.cond, way, config)
        target = v - common.expand(t - s, x) * slope
        weight = time_weight(t, s)
    return flow_maps.finish(begun, predicted, target, config, weight=weight)


def time_weight(t, s):
    """1 / sqrt(tan t - tan s + 1) `B`; the times are angles in radians."""
    return jax.lax.rsqrt(jnp.tan(t) - jnp.tan(s) + 1)

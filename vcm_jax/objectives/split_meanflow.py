"""SplitMeanFlow: the average velocity by splitting the interval (Guo et al. 2025)."""

import dataclasses

import jax

from vcm_jax.objectives import common
from vcm_jax.objectives.base import GuidedObjective, Passes
from vcm_jax.objectives.composed import composed_loss, composed_passes
from vcm_jax.settings import number, setting


@dataclasses.dataclass(frozen=True)
class SplitMeanFlowConfig(GuidedObjective):
    """Settings of the objective.

    The paper takes its guidance from a teacher. Here guidance is part of the target at s = t, as in
    `VCMConfig`, whose defaults this class shares, but for p, which is 0: an adaptive weight biases
    the velocity at s = t, and targets that are made of the network's own jumps add that bias up.
    (On the guided mixture of benchmarks/toy_flows.py the energy distance at 25 steps is 0.10 with
    p = 1 and 0.002 with p = 0.)

    Attributes:
      guidance_scale, mix_ratio, guidance_interval, p, eps, instant_ratio, time_mean, time_std: see
        `GuidedObjective`.
    """

    name = "split_meanflow"
    p: float = setting(0.0, number(0))
    # Its jumps learn from the network alone: without rows with s = t, zero would be a solution.
    instant_ratio: float = setting(0.75, number(above=0, high=1))

    def loss(self, u, *batch, **options):
        return split_meanflow_loss(u, *batch, self, **options)

    def passes(self) -> Passes:
        return composed_passes(self)

    def draw(self, key, batch_size: int, num_instant: int, step, steps: int):
        """t, s and lam, `B` each; lam, uniform in [0, 1], says where the interval is split."""
        t, s, _ = super().draw(key, batch_size, num_instant, step, steps)
        return t, s, jax.random.uniform(jax.random.fold_in(key, 1), (batch_size,))


def split_meanflow_loss(
    u, x0, x1, t, s, lam, cond, null_cond, is_null, config: SplitMeanFlowConfig, **options
):
    """The SplitMeanFlow loss: a jump is trained towards two jumps that meet at l = t + (s - t) lam.

    The target is sg(lam u(x_t, t, l) + (1 - lam) u(x_l, l, s)), x_l = x_t + (l - t) u(x_t, t, l);
    see `composed_loss`, also for the cost.

    Arguments and results are those of `vcm_loss`; `lam` is a scalar or `B`, in [0, 1].
    """
    t, s, lam = map(common.at_least_float32, (t, s, lam))

    batch = (x0, x1, t, s, t + (s - t) * lam, cond, null_cond, is_null)
    return composed_loss(u, batch, config, lambda t, l: l, **options)

"""Weighted conditional flow matching: near pairs count more (Calvo-Ordonez et al. 2025)."""

import dataclasses

import jax

from vcm_jax.objectives import common
from vcm_jax.objectives.flow_matching import FlowMatchingConfig, pair_mse
from vcm_jax.settings import number, setting


@dataclasses.dataclass(frozen=True)
class WCFMConfig(FlowMatchingConfig):
    """Settings of the objective.

    Attributes:
      guidance_scale, guidance_interval, time_mean, time_std: see `FlowMatchingConfig`.
      gibbs_eps: temperature of the Gibbs weights. A small one straightens the paths and favours
        data of small norm; a large one is flow matching.
    """

    name = "wcfm"
    couples_rows = True
    gibbs_eps: float = setting(1.0, number(above=0))

    def loss(self, u, *batch, **options):
        return wcfm_loss(u, *batch, self, **options)


def wcfm_loss(
    u,
    x0,
    x1,
    t,
    s,
    lam,
    cond,
    null_cond,
    is_null,
    config: WCFMConfig,
    *,
    num_instant: int,
    constrain=common.identity,
):
    """Flow matching, each pair weighted by exp(-cost / gibbs_eps), cost = mean (x1 - x0)^2.

    The weights are normalised to a mean of 1 over the batch (over each microbatch where gradients
    are accumulated). In the limit of large batches this is flow matching under the entropic
    optimal transport between tilted marginals. The paper's cost is the sum over N and C; the mean
    is a choice made here, so that the temperature means the same for clips of any length. It costs
    the differentiated pass alone.

    Arguments and results are those of `vcm_loss`; `s`, `lam`, `num_instant` and `constrain` have
    no effect.
    """
    del s, lam, num_instant, constrain
    mse, v = pair_mse(u, x0, x1, t, cond, null_cond, is_null)
    weight = jax.nn.softmax(-common.mean_square(v) / config.gibbs_eps) * len(mse)
    return (weight * mse).mean(), {"mse": mse, "target": v, "velocity_mse": mse}

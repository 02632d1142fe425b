"""Weighted conditional flow matching: near pairs count more (Calvo-Ordonez et al. 2025)."""

import dataclasses

import jax

from vcm_jax.objectives import common
from vcm_jax.objectives.flow_matching import draw as draw
from vcm_jax.objectives.flow_matching import pair_mse


@dataclasses.dataclass(frozen=True)
class WCFMConfig:
    """Settings of the objective.

    Attributes:
      gibbs_eps: temperature of the Gibbs weights: small straightens paths and favours data of
        small norm, large is flow matching.
      guidance_scale, guidance_interval: as `FlowMatchingConfig`'s, when the run is sampled.
      time_mean, time_std: mu and sigma of the logit-normal times.

    Raises:
      ValueError: when a setting is out of its range.
    """

    gibbs_eps: float = 1.0
    guidance_scale: float = 4.5
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    time_mean: float = 0.0
    time_std: float = 1.0

    def __post_init__(self):
        common.check_settings(self, gibbs_eps=(lambda eps: eps > 0, "must be > 0"))


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
    constrain=lambda tree: tree,
):
    """Flow matching, each pair weighted by exp(-cost / gibbs_eps), cost = mean (x1 - x0)^2.

    The weights are normalised to a mean of 1 over the batch (where gradients are accumulated, over
    each microbatch); in its limit this is flow matching
    under the coupling of the entropic optimal transport between tilted marginals. The mean over N
    and C in the cost, where the paper has the sum, is a choice: the temperature keeps its meaning
    for clips of any length. Network evaluations: the differentiated pass alone.

    Args, returns: as `vcm_loss`; `s`, `lam`, `num_instant` and `constrain` are of no effect.
    """
    del s, lam, num_instant, constrain
    mse, v = pair_mse(u, x0, x1, t, cond, null_cond, is_null)
    weight = jax.nn.softmax(-common.mean_square(v) / config.gibbs_eps) * len(mse)
    return (weight * mse).mean(), {"mse": mse, "target": v, "velocity_mse": mse}

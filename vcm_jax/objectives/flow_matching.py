"""Flow matching as MMAudio trains it: the baseline, guided when it is sampled."""

import dataclasses

from vcm_jax.objectives import common
from vcm_jax.objectives.base import Objective, Passes
from vcm_jax.settings import TIME_INTERVAL, number, setting


@dataclasses.dataclass(frozen=True)
class FlowMatchingConfig(Objective):
    """Settings of the objective; the defaults are MMAudio's.

    Attributes:
      guidance_scale, guidance_interval: w of classifier-free guidance, and the times t at which it
        applies, when the run is sampled. They do not affect training.
      time_mean, time_std: mu and sigma of the logit-normal times.
    """

    name = "flow_matching"
    instant_only = True
    guidance_scale: float = setting(4.5, number(0))
    guidance_interval: tuple[float, float] = setting((0.0, 1.0), TIME_INTERVAL)
    time_mean: float = setting(0.0, number())
    time_std: float = setting(1.0, number(above=0))

    def loss(self, u, *batch, **options):
        return flow_matching_loss(u, *batch, self, **options)

    def passes(self) -> Passes:
        return Passes()


def pair_mse(u, x0, x1, t, cond, null_cond, is_null):
    """The error of the instantaneous velocity on given pairs of data and noise.

    Returns:
      The mean over N and C of (u(x_t, t, t, c) - (x1 - x0))^2, `B`, and x1 - x0, `B N C`.
    """
    x0, x1, t = map(common.at_least_float32, (x0, x1, t))
    cond = common.select_rows(is_null, null_cond, cond)
    v = x1 - x0
    return common.mean_square(common.wide(u)(common.noised(x0, x1, t), t, t, cond) - v), v


def flow_matching_loss(
    u,
    x0,
    x1,
    t,
    s,
    lam,
    cond,
    null_cond,
    is_null,
    config: FlowMatchingConfig,
    *,
    num_instant: int,
    constrain=common.identity,
):
    """The flow matching loss: the mean of (u(x_t, t, t, c) - (x1 - x0))^2.

    It is minimal at the marginal velocity E[x1 - x0 | x_t]. It costs the differentiated pass alone.

    Arguments and results are those of `vcm_loss`; `s`, `lam`, `num_instant` and `constrain` have
    no effect.
    """
    del s, lam, config, num_instant, constrain
    mse, v = pair_mse(u, x0, x1, t, cond, null_cond, is_null)
    return mse.mean(), {"mse": mse, "target": v, "velocity_mse": mse}

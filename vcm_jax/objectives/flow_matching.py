"""Flow matching as MMAudio trains it: the baseline, guided when it is sampled."""

import dataclasses

from vcm_jax.objectives import common, times


@dataclasses.dataclass(frozen=True)
class FlowMatchingConfig:
    """Settings of the objective; the defaults are MMAudio's.

    Attributes:
      guidance_scale, guidance_interval: w of classifier-free guidance, and the times t at which it
        applies, when the run is sampled; training does not see them.
      time_mean, time_std: mu and sigma of the logit-normal times.

    Raises:
      ValueError: when a setting is out of its range.
    """

    guidance_scale: float = 4.5
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    time_mean: float = 0.0
    time_std: float = 1.0

    def __post_init__(self):
        common.check_settings(self)


def draw(key, batch_size: int, num_instant: int, step, steps: int, config):
    """t = s, `B` each, logit-normal; and no lambda."""
    del step, steps
    t, s = times.sample_times(key, batch_size, num_instant, config.time_mean, config.time_std)
    return t, s, None


def pair_mse(u, x0, x1, t, cond, null_cond, is_null):
    """(u(x_t, t, t, c) - (x1 - x0))^2, mean over N and C, and x1 - x0: `B`, `B N C`.

    What flow matching does with given pairs; one network evaluation, differentiated.
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
    constrain=lambda tree: tree,
):
    """The flow matching loss: the mean of (u(x_t, t, t, c) - (x1 - x0))^2.

    Its minimum is the marginal velocity E[x1 - x0 | x_t]. Network evaluations: the differentiated
    pass alone.

    Args, returns: as `vcm_loss`; `s`, `lam`, `num_instant` and `constrain` are of no effect.
    """
    del s, lam, config, num_instant, constrain
    mse, v = pair_mse(u, x0, x1, t, cond, null_cond, is_null)
    return mse.mean(), {"mse": mse, "target": v, "velocity_mse": mse}

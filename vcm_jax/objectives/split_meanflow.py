"""SplitMeanFlow: the average velocity by splitting the interval (Guo et al. 2025)."""

import dataclasses

import jax

from vcm_jax.objectives import common, times


@dataclasses.dataclass(frozen=True)
class SplitMeanFlowConfig:
    """Settings of the objective.

    The paper takes its guidance from a teacher; here it is trained in at s = t, as in `VCMConfig`,
    whose values and times the defaults share. But p is 0: a target made of the network's own jumps
    alone takes over the bias that an adaptive weight has at s = t, and adds it up (on the guided
    mixture of benchmarks/toy_flows.py, energy distances of 0.10 with p = 1 and 0.002 with p = 0, at
    25 steps).

    Attributes:
      guidance_scale, mix_ratio, guidance_interval: of the target at s = t, as `VCMConfig`'s.
      p, eps: of the adaptive weight; p = 0 is the plain mean squared error.
      instant_ratio: the part of the rows with s = t.
      time_mean, time_std: mu and sigma of the logit-normal times.

    Raises:
      ValueError: when a setting is out of its range.
    """

    guidance_scale: float = 4.0
    mix_ratio: float = 0.25
    guidance_interval: tuple[float, float] = (0.0, 0.8)
    p: float = 0.0
    eps: float = 0.01
    instant_ratio: float = 0.75
    time_mean: float = -0.4
    time_std: float = 1.0

    def __post_init__(self):
        common.check_settings(self)


def draw(key, batch_size: int, num_instant: int, step, steps: int, config):
    """t, s and where between them the interval is split, uniform in [0, 1]: `B` each."""
    del step, steps
    t, s = times.sample_times(key, batch_size, num_instant, config.time_mean, config.time_std)
    return t, s, jax.random.uniform(jax.random.fold_in(key, 1), (batch_size,))


def split_meanflow_loss(
    u,
    x0,
    x1,
    t,
    s,
    lam,
    cond,
    null_cond,
    is_null,
    config: SplitMeanFlowConfig,
    *,
    num_instant: int,
    constrain=lambda tree: tree,
):
    """The SplitMeanFlow loss: jumps to s aim at two jumps that meet at l = t + (s - t) lam.

    sg(lam u(x_t, t, l) + (1 - lam) u(x_l, l, s)), x_l = x_t + (l - t) u(x_t, t, l); the first
    `num_instant` rows aim at the guided velocity. Network evaluations, in forward passes over the
    batch with r = num_instant / B: the unconditional velocity of the s = t rows r, both halves of
    the s < t rows 2 (1 - r), and the differentiated pass.

    Args, returns: as `vcm_loss`; `lam` is a scalar or `B`, in [0, 1].
    """
    t, s, lam = map(common.at_least_float32, (t, s, lam))
    return common.composed_loss(
        u, x0, x1, t, s, t + (s - t) * lam, cond, null_cond, is_null, config, num_instant,
        constrain, at=lambda t, l: l,
    )  # fmt: skip

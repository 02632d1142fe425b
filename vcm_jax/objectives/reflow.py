"""Rectified flow: flow matching on the pairs that a trained model makes (Liu et al. 2022)."""

import dataclasses

from vcm_jax.objectives import common
from vcm_jax.objectives.flow_matching import draw as draw
from vcm_jax.objectives.flow_matching import flow_matching_loss


@dataclasses.dataclass(frozen=True)
class ReflowConfig:
    """Settings of the objective.

    The teacher's guidance is in its samples, so that the student needs none: its guidance_scale
    is 1. The distribution of the times is MMAudio's, as the teacher's.

    Attributes:
      teacher: workdir of the trained run that makes data out of noise.
      teacher_steps: of its sampler, uniform.
      guidance_scale, guidance_interval: as `FlowMatchingConfig`'s.
      time_mean, time_std: mu and sigma of the logit-normal times.

    Raises:
      ValueError: when a setting is out of its range.
    """

    teacher: str = ""
    teacher_steps: int = 25
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    time_mean: float = 0.0
    time_std: float = 1.0

    def __post_init__(self):
        common.check_settings(self, teacher_steps=(lambda n: n >= 1, "must be >= 1"))


def reflow_loss(
    u,
    x0,
    x1,
    t,
    s,
    lam,
    cond,
    null_cond,
    is_null,
    config: ReflowConfig,
    *,
    num_instant: int,
    constrain=lambda tree: tree,
):
    """Flow matching on given pairs: x0 is what the teacher's sampler makes of the noise x1.

    With the exact teacher the pairs lie on the flow's trajectories, u(x_t, t, t, c) = x1 - x0 has
    no error left, and one Euler step is exact. Network evaluations: the differentiated pass alone,
    beside what the teacher needs to make x0 (its steps, twice that with guidance).

    Args, returns: as `vcm_loss`; `s`, `lam`, `num_instant` and `constrain` are of no effect.
    """
    return flow_matching_loss(
        u, x0, x1, t, s, lam, cond, null_cond, is_null, config,
        num_instant=num_instant, constrain=constrain,
    )  # fmt: skip

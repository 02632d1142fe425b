"""Rectified flow: flow matching on the pairs that a trained run makes (Liu et al. 2022)."""

import dataclasses

from vcm_jax.objectives import common
from vcm_jax.objectives.flow_matching import FlowMatchingConfig, flow_matching_loss
from vcm_jax.settings import TEXT, integer, number, setting


@dataclasses.dataclass(frozen=True)
class ReflowConfig(FlowMatchingConfig):
    """Settings of the objective.

    The samples of the teacher are guided, so that the student needs no guidance: its
    `guidance_scale` is 1. Its times are distributed as MMAudio's.

    Attributes:
      guidance_scale, guidance_interval, time_mean, time_std: see `FlowMatchingConfig`.
      teacher: workdir of the trained run that turns noise into data.
      teacher_steps: steps of the teacher's sampler, of equal length.
    """

    name = "reflow"
    needs_teacher = True
    guidance_scale: float = setting(1.0, number(0))
    teacher: str = setting("", TEXT)
    teacher_steps: int = setting(25, integer(1))

    def loss(self, u, *batch, **options):
        return reflow_loss(u, *batch, self, **options)


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
    constrain=common.identity,
):
    """Flow matching on given pairs: x0 is what the teacher's sampler makes of the noise x1.

    With an exact teacher the pairs lie on trajectories of the flow. Then u(x_t, t, t, c) = x1 - x0
    has no error left, and one Euler step is exact. It costs the differentiated pass alone, and the
    steps with which the teacher makes x0 (two evaluations each with guidance).

    Arguments and results are those of `vcm_loss`; `s`, `lam`, `num_instant` and `constrain` have
    no effect.
    """
    return flow_matching_loss(
        u,
        x0,
        x1,
        t,
        s,
        lam,
        cond,
        null_cond,
        is_null,
        config,
        num_instant=num_instant,
        constrain=constrain,
    )

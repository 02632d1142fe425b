"""Rectified flow: flow matching on the pairs that a trained run makes (Liu et al. 2022)."""

import dataclasses

import jax
import jax.numpy as jnp

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
      anneal: fraction of the run over which pairs turn into the teacher's (SlimFlow, Zhu et al.
        2024): at first x0 meets independent noise, as in flow matching. 0, the default, is reflow.
      two_leg: SlimFlow's last stage, for runs that start from a rectified one: t = 1 in all rows,
        so that the student learns to sample in one step alone, and this is the weight of its second
        loss (the paper's is 1; see `reflow_loss`). 0, the default, is reflow.

    Raises:
      ValueError: a setting out of its range, or both stages of SlimFlow at once.
    """

    name = "reflow"
    needs_teacher = True
    guidance_scale: float = setting(1.0, number(0))
    teacher: str = setting("", TEXT)
    teacher_steps: int = setting(25, integer(1))
    anneal: float = setting(0.0, number(0, 1))
    two_leg: float = setting(0.0, number(0))

    def __post_init__(self):
        super().__post_init__()
        if self.anneal and self.two_leg:
            raise ValueError(
                "objective.anneal and objective.two_leg are stages of their own: one must be 0"
            )

    @property
    def teacher_velocity(self) -> str:
        return "guided" if self.two_leg else ""

    def draw(self, key, batch_size: int, num_instant: int, step, steps: int):
        """t, s and lam, `B` each.

        lam is (the share b of fresh noise, a key for each row) with `anneal`, and times m, uniform
        in [0.2, 0.8], with `two_leg`.
        """
        t, s, lam = super().draw(key, batch_size, num_instant, step, steps)
        if self.two_leg:
            m = jax.random.uniform(key, (batch_size,), minval=0.2, maxval=0.8)
            return jnp.ones_like(t), jnp.ones_like(s), m
        if self.anneal:
            part = jnp.asarray(step, jnp.float32) / steps
            keys = jax.random.split(jax.random.fold_in(key, 1), batch_size)
            lam = (jnp.maximum(1 - part / self.anneal, 0), keys)
        return t, s, lam

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
    teacher_u=None,
):
    """Flow matching on given pairs: x0 is what the teacher's sampler makes of the noise x1.

    With an exact teacher the pairs lie on trajectories of the flow. Then u(x_t, t, t, c) = x1 - x0
    has no error left, and one Euler step is exact. It costs the differentiated pass alone, and the
    steps with which the teacher makes x0 (two evaluations each with guidance).

    With `anneal` the noise of a pair is sqrt(1 - b^2) x1 + b xi, xi fresh noise, with a share b
    that falls from 1 to 0: flow matching turns into reflow.

    With `two_leg` the student's u = u(x1, 1, 1, c) is also trained towards sg((1 - m) u + m V): its
    own jump from 1 to a random time m, and from there the teacher's velocity V to 0. That costs one
    evaluation of the teacher more (two with guidance). The paper takes fresh noise for this loss,
    and so a second differentiated pass; here both losses share the noise x1 and the pass.

    Arguments and results are those of `vcm_loss`; `s`, `num_instant` and `constrain` have no
    effect, and `lam` is None or that of `ReflowConfig.draw`. `teacher_u` is the teacher's guided
    velocity, for `two_leg`.
    """
    if config.two_leg:
        batch = (x0, x1, t, lam, cond, null_cond, is_null)
        return _two_leg_loss(u, teacher_u, *batch, config.two_leg)
    if config.anneal:
        share, keys = lam
        fresh = jax.vmap(lambda key: jax.random.normal(key, x1.shape[1:], x1.dtype))(keys)
        x1 = jnp.sqrt(1 - share**2) * x1 + share * fresh
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


def _two_leg_loss(u, teacher_u, x0, x1, t, m, cond, null_cond, is_null, weight: float):
    """The last stage of SlimFlow, see `reflow_loss`."""
    x0, x1, t, m = map(common.at_least_float32, (x0, x1, t, m))
    cond = common.select_rows(is_null, null_cond, cond)
    predicted, v = common.wide(u)(common.noised(x0, x1, t), t, t, cond), x1 - x0
    frozen, share = jax.lax.stop_gradient(predicted), common.expand(m, x1)
    landed = x1 + (share - 1) * frozen
    field = jax.lax.stop_gradient(common.wide(teacher_u)(landed, m, m, cond))
    mse = common.mean_square(predicted - v)
    legs = common.mean_square(predicted - (1 - share) * frozen - share * field)
    aux = {"mse": mse, "target": v, "velocity_mse": mse}
    return (mse + weight * legs).mean(), aux

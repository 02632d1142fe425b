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
    """

    name = "reflow"
    needs_teacher = True
    guidance_scale: float = setting(1.0, number(0))
    teacher: str = setting("", TEXT)
    teacher_steps: int = setting(25, integer(1))
    anneal: float = setting(0.0, number(0, 1))

    def draw(self, key, batch_size: int, num_instant: int, step, steps: int):
        """t and s `B`; with `anneal` also (the share b of fresh noise, a key for each row)."""
        t, s, lam = super().draw(key, batch_size, num_instant, step, steps)
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
):
    """Flow matching on given pairs: x0 is what the teacher's sampler makes of the noise x1.

    With an exact teacher the pairs lie on trajectories of the flow. Then u(x_t, t, t, c) = x1 - x0
    has no error left, and one Euler step is exact. It costs the differentiated pass alone, and the
    steps with which the teacher makes x0 (two evaluations each with guidance).

    With `anneal` the noise of a pair is sqrt(1 - b^2) x1 + b xi, xi fresh noise, with a share b
    that falls from 1 to 0: flow matching turns into reflow.

    Arguments and results are those of `vcm_loss`; `s`, `num_instant` and `constrain` have no
    effect, and `lam` is None or that of `ReflowConfig.draw`.
    """
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

"""What objectives of average velocities share: derivatives of u, and the frame of their losses.

With the velocity field V, the jump f(x, t, s) = x + (s - t) u(x, t, s), and D_t u the derivative of
u(x_t, t, s) by t along dx/dt = V, the average velocity of the flow satisfies each of

- the Eulerian identity, u = V - (t - s) D_t u (MeanFlow),
- the Lagrangian identity, u + (s - t) d/ds u = V(f, s),
- the semigroup identity, two jumps are one (`composed.py`).

An objective is one of them with a choice of V, of the way to differentiate, and of weights.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vcm_jax.objectives import common
from vcm_jax.objectives.guidance import guided_target
from vcm_jax.settings import choice, number, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimeDerivative:
    """Settings of objectives that differentiate the network by a time; for their classes.

    Attributes:
      derivative: "jvp" is exact, and needs an attention implementation with forward mode.
        "central" is a central difference: two passes instead of a tangent, for any attention. Its
        error is of second order in the step, and rounding errors grow as the step shrinks: the
        network should compute in float32.
      derivative_step: of the central difference.
    """

    derivative: str = setting("jvp", choice("jvp", "central"))
    derivative_step: float = setting(0.005, number(above=0, high=0.1))

    @property
    def needs_jvp(self) -> bool:
        return self.derivative == "jvp"

    @property
    def derivative_passes(self) -> int:
        """Passes of a derivative, besides that of u itself."""
        return 1 if self.derivative == "jvp" else 2


def along_flow(u, x, t, s, cond, velocity, config: TimeDerivative):
    """u(x, t, s) and its derivative by t along dx/dt = velocity, `B N C` each.

    The central difference stays within [s, 1]: at the ends of this interval it is one-sided.

    Args:
      u: `u(x, t, s, cond)` -> `B N C`.
      x, velocity: `B N C`.
      t, s: times `B`, s < t.
      cond: the condition.
      config: how the derivative is taken.
    """

    def at(x, t):
        return u(x, t, s, cond)

    if config.derivative == "jvp":
        return jax.jvp(at, (x, t), (velocity, jnp.ones_like(t)))
    after = jnp.minimum(t + config.derivative_step, 1)
    before = jnp.maximum(t - config.derivative_step, s)
    ends = [at(x + common.expand(time - t, x) * velocity, time) for time in (after, before)]
    slope = (ends[0] - ends[1]) / common.expand(after - before, x)
    return at(x, t), jax.lax.stop_gradient(slope)


def by_end(u, x, t, s, cond, config: TimeDerivative):
    """u(x, t, s) and its derivative by s, which leaves x alone; arguments as `along_flow`'s.

    The central difference stays within [0, t].
    """

    def at(s):
        return u(x, t, s, cond)

    if config.derivative == "jvp":
        return jax.jvp(at, (s,), (jnp.ones_like(s),))
    after = jnp.minimum(s + config.derivative_step, t)
    before = jnp.maximum(s - config.derivative_step, 0)
    return at(s), (at(after) - at(before)) / common.expand(after - before, x)


def jump(u_ts, x, t, s):
    """f(x, t, s) = x + (s - t) u: `B N C`, `B N C`, times `B` -> `B N C`."""
    return x + common.expand(s - t, x) * u_ts


@dataclasses.dataclass(frozen=True)
class Begun:
    """A batch whose s = t rows are done, and what the jumps of the others need.

    Attributes:
      u: the network, at least float32.
      target_u: the network that the targets take, which is not trained; as `u`.
      lam: the batch's.
      num_instant: n, the number of rows with s = t, which come first.
      v: x1 - x0, `B N C`.
      v_g: the guided velocity, without gradient; of all rows, or of those with s = t.
      predicted: u(x_t, t, t, c) of the first n rows.
      x, t, s, cond: of the other rows.
      field: `field(x, time)` -> the velocity field of the other rows without gradient, `B - n N C`:
        the teacher's, guided, or that of `target_u`.
      constrain: spreads joined rows over the devices again.
    """

    u: Callable
    target_u: Callable
    lam: Any
    num_instant: int
    v: jax.Array
    v_g: jax.Array
    predicted: jax.Array
    x: jax.Array
    t: jax.Array
    s: jax.Array
    cond: Any
    field: Callable
    constrain: Callable

    @property
    def v_later(self):
        """The guided velocity of the s < t rows."""
        return self.v_g[self.num_instant :]

    @property
    def has_jumps(self) -> bool:
        """Whether there are rows with s < t."""
        return self.num_instant < len(self.v)

    def join(self, first, later):
        """Rows of both kinds, `B ...`."""
        return self.constrain(jnp.concatenate([first, later]))


def begin(
    u,
    batch,
    config,
    *,
    num_instant: int,
    constrain=common.identity,
    guidance=None,
    target_u=None,
    teacher_u=None,
    guide_jumps: bool = True,
):
    """The part of a loss that these objectives share.

    It evaluates the trained pass of the s = t rows, and what guidance needs: the unconditional
    velocity of all rows, and the guided one of the s < t rows. Without `guide_jumps` nothing is
    evaluated for the latter, and `v_g` has the s = t rows alone.

    Args:
      u, config, num_instant, constrain, guidance, target_u: as `vcm_loss`'s.
      batch: (x0, x1, t, s, lam, cond, null_cond, is_null) of `vcm_loss`.
      teacher_u: the network of a teacher, as `u`. Its velocity then takes the place of x1 - x0 in
        the guided velocity, also for rows without a condition.
      guide_jumps: whether `v_g` is wanted for the s < t rows.

    Raises:
      ValueError: when `num_instant` is not within the batch.
    """
    x0, x1, t, s, lam, cond, null_cond, is_null = batch
    n = num_instant
    common.check_rows(n, x0.shape[0])
    x0, x1, t, s = map(common.at_least_float32, (x0, x1, t, s))
    u = common.wide(u)
    first, later = common.rows(0, n, constrain), common.rows(n, None, constrain)
    x_t, v = common.noised(x0, x1, t), x1 - x0
    cond = common.select_rows(is_null, null_cond, cond)
    predicted = x_t[:0]
    if n:
        x_first, t_first, cond_first = first((x_t, t, cond))
        predicted = u(x_first, t_first, t_first, cond_first)
    net, known = common.for_targets(u, target_u if teacher_u is None else teacher_u, predicted)

    def guided(x, v, time, rows, known):
        cond, null_cond, is_null, guidance = rows
        if teacher_u is not None:
            v = jax.lax.stop_gradient(net(x, time, time, cond))
        return guided_target(
            net,
            known,
            x,
            v,
            time,
            cond,
            null_cond,
            is_null,
            scale=config.scale(guidance),
            mix_ratio=config.mix_ratio,
            interval=config.interval(guidance),
            constrain=constrain,
        )

    def field(x, time):
        if teacher_u is None:
            return jax.lax.stop_gradient(net(x, time, time, later(cond)))
        return guided(x, None, time, later(conditions), known[:0])

    conditions = (cond, null_cond, is_null, guidance)
    wanted = (x_t, v, t, conditions)
    v_g = guided(*(wanted if guide_jumps else first(wanted)), known)
    target_u = common.for_targets(u, target_u, predicted)[0]
    rest = later((x_t, t, s, cond))
    return Begun(u, target_u, lam, n, v, v_g, predicted, *rest, field, constrain)


def finish(
    begun: Begun,
    predicted,
    target,
    config,
    *,
    total: bool = False,
    weight=None,
    plain_instant: bool = False,
):
    """The weighted regression of all rows.

    Args:
      begun: from `begin`.
      predicted, target: of the s < t rows, `B - n N C`; no gradient goes through the target. None
        without such rows.
      config: its `p` and `eps` make the adaptive weight.
      total: whether that weight and the loss take the squared error summed over N and C, instead of
        its mean.
      weight: a further weight of the s < t rows, `B - n`.
      plain_instant: whether the s = t rows have no adaptive weight.

    Returns:
      As `vcm_loss`.
    """
    n, v = begun.num_instant, begun.v
    if begun.has_jumps:
        target = begun.join(begun.v_g[:n], target)
        predicted = begun.join(begun.predicted, predicted)
    else:
        target, predicted = begun.v_g, begun.predicted
    target = jax.lax.stop_gradient(target)
    mse = common.mean_square(predicted - target)
    elements = v[0].size if total else 1
    weights = common.adaptive_weight(elements * mse, config.p, config.eps)
    if plain_instant:
        weights = jnp.where(jnp.arange(len(v)) < n, 1.0, weights)
    if weight is not None and begun.has_jumps:
        weights = weights * begun.join(jnp.ones(n, mse.dtype), jax.lax.stop_gradient(weight))
    loss = (weights * elements * mse).mean()
    velocity_mse = common.mean_square(begun.predicted - v[:n])
    return loss, {"mse": mse, "target": target, "velocity_mse": velocity_mse}

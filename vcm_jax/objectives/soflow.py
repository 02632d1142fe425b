"""SoFlow, published as BiTCAM for video-to-audio: the flow's solution operator."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from vcm_jax.objectives import common, times
from vcm_jax.objectives.guidance import smooth_decay

_KINDS = (lambda kind: kind in ("linear", "trigonometric"), "must be linear or trigonometric")


@dataclasses.dataclass(frozen=True)
class SoFlowConfig:
    """Settings of the objective; the defaults are the ones of SoFlow's code on ImageNet.

    BiTCAM's page gives no other values for its S-16k and L-16k models than the end of the schedule,
    lambda 0.1 to 0.001, which is the default here (SoFlow's own is 0.002).

    Attributes:
      parameterisation: of f(x, t, s) = a x + b u(x, t, s); "euler" has a = 1, b = s - t,
        "trigonometric" a = cos(pi/2 (s - t)), b = sin(pi/2 (s - t)).
      noising: "linear" has x_t = (1 - t) x0 + t x1, "trigonometric" cos(pi/2 t) x0 +
        sin(pi/2 t) x1.
      guidance_scale: w; 1 is no guidance and no mixing.
      mix_ratio: m, how much of the guided velocity is the sample's and not the network's own.
      decay_start, decay_rate: where guidance begins to fall to 0 at t = 1, and kappa, how fast; see
        `guidance.smooth_decay`.
      p, eps: of the adaptive weights.
      instant_ratio: the part of the rows with s = t (the velocity loss).
      lambda_init, lambda_end: of the schedule that moves l to t.
      time_mean, time_std: of the logit-normal t of the velocity loss.
      jump_mean, jump_std, later_mean, later_std: of t and of s in the consistency loss.

    Raises:
      ValueError: when a setting is out of its range.
    """

    parameterisation: str = "euler"
    noising: str = "linear"
    guidance_scale: float = 3.0
    mix_ratio: float = 0.25
    decay_start: float = 0.8
    decay_rate: float = 0.025
    p: float = 1.0
    eps: float = 0.01
    instant_ratio: float = 0.75
    lambda_init: float = 1 / 10
    lambda_end: float = 1 / 1000
    time_mean: float = -0.2
    time_std: float = 1.0
    jump_mean: float = 0.2
    jump_std: float = 0.8
    later_mean: float = -1.0
    later_std: float = 0.8

    def __post_init__(self):
        common.check_settings(
            self,
            parameterisation=(
                lambda kind: kind in ("euler", "trigonometric"),
                "must be euler or trigonometric",
            ),
            noising=_KINDS,
            decay_start=(lambda start: 0 <= start <= 1, "must be in [0, 1]"),
            decay_rate=(lambda rate: rate > 0, "must be > 0"),
            jump_std=(lambda std: std > 0, "must be > 0"),
        )


def draw(key, batch_size: int, num_instant: int, step, steps: int, config: SoFlowConfig):
    """t and s `B`, and the scalar lambda of the step, see `soflow_loss`."""
    keys = jax.random.split(key, 3)
    instant = jnp.arange(batch_size) < num_instant
    shape = (batch_size,)
    velocity_t = times.logit_normal(keys[0], shape, config.time_mean, config.time_std)
    t = times.logit_normal(keys[1], shape, config.jump_mean, config.jump_std)
    s = times.logit_normal(keys[2], shape, config.later_mean, config.later_std)
    t = jnp.maximum(jnp.where(instant, velocity_t, t), times.MIN_GAP)
    s = jnp.where(instant, t, jnp.minimum(s, t - times.MIN_GAP))
    return t, s, times.lambda_schedule(step, steps, config.lambda_init, config.lambda_end)


def noised(x0, x1, t, kind: str):
    """x_t `B N C` of linear or trigonometric noising; t is `B` or a scalar."""
    t = common.expand(t, x0)
    if kind == "linear":
        return (1 - t) * x0 + t * x1
    return jnp.cos(np.pi / 2 * t) * x0 + jnp.sin(np.pi / 2 * t) * x1


def _sample_velocity(x0, x1, t, kind: str):
    """d/dt x_t of `noised`."""
    if kind == "linear":
        return x1 - x0
    t = common.expand(t, x0)
    return np.pi / 2 * (jnp.cos(np.pi / 2 * t) * x1 - jnp.sin(np.pi / 2 * t) * x0)


def _coefficients(t, s, kind: str):
    """a and b of f = a x + b u."""
    if kind == "euler":
        return jnp.ones_like(t), s - t
    return jnp.cos(np.pi / 2 * (s - t)), jnp.sin(np.pi / 2 * (s - t))


def _slope(kind: str) -> float:
    """db/ds at s = t: the instant velocity is this times the network."""
    return 1.0 if kind == "euler" else np.pi / 2


def velocity(net, config: SoFlowConfig):
    """The network as an average velocity u = (f - x) / (s - t), and as the instant one at s = t.

    `net(x, t, s, cond)` -> `u(x, t, s, cond)`.
    """
    if config.parameterisation == "euler":
        return net

    def u(x, t, s, cond):
        out, (a, b) = net(x, t, s, cond), _coefficients(t, s, config.parameterisation)
        gap = jnp.where(s == t, 1, s - t)
        a, b = jnp.where(s == t, 0, (a - 1) / gap), jnp.where(s == t, np.pi / 2, b / gap)
        return common.expand(a, x) * x + common.expand(b, x) * out

    return u


def soflow_loss(
    u,
    x0,
    x1,
    t,
    s,
    lam,
    cond,
    null_cond,
    is_null,
    config: SoFlowConfig,
    *,
    num_instant: int,
    constrain=lambda tree: tree,
):
    """SoFlow's velocity loss on the first rows and its consistency loss on the others.

    The first `num_instant` rows: d/ds f(x_t, t, t) aims at the guided velocity v, weight
    1 / (|db/ds| (mse + eps)^p). The others: f(x_t, t, s) aims at sg f(x_l, l, s), where
    l = t + (s - t) lam and x_l = x_t + (l - t) v; their mse is that of the difference quotient
    (f(x_t, t, s) - sg f(x_l, l, s)) / (t - l) and their weight (t - l) / (2 |b(t, s)| (mse +
    eps)^p); the 1/2, which BiTCAM's page does not have, is that of the released gradients. Network
    evaluations, in forward passes over the batch with r = num_instant / B: the unconditional
    velocity of all rows 1, the guided velocity and f(x_l, l, s) of the others 2 (1 - r), and the
    differentiated pass. Where w = 1 or m = 1, the passes that have no effect are left out.

    Args, returns: as `vcm_loss`, but for `u`, the network in f = a x + b u, and no
    `aux["target"]`; `lam` is a scalar or `B`.
    """
    n, batch_size = num_instant, x0.shape[0]
    common.check_rows(n, batch_size)
    x0, x1, t, s = map(common.at_least_float32, (x0, x1, t, s))
    net, later = common.wide(u), common.rows(n, None, constrain)
    kind, slope = config.parameterisation, _slope(config.parameterisation)

    x_t, v = noised(x0, x1, t, config.noising), _sample_velocity(x0, x1, t, config.noising)
    cond = common.select_rows(is_null, null_cond, cond)
    out = net(x_t, t, s, cond)
    unguided = config.guidance_scale == 1
    decay = smooth_decay(t, config.decay_start, config.decay_rate)
    v_g = common.guided_target(
        lambda x, t, c: slope * net(x, t, t, c), slope * out[:n], x_t, v, t, cond, null_cond,
        is_null, scale=1 if unguided else 1 + decay * (config.guidance_scale - 1),
        mix_ratio=1.0 if unguided else config.mix_ratio, constrain=constrain,
    )  # fmt: skip
    error, scale = slope * out[:n] - v_g[:n], jnp.full(n, 1 / slope, x_t.dtype)
    if n < batch_size:
        x_, t_, s_, v_, cond_ = later((x_t, t, s, v_g, cond))
        l, _ = times.intermediate_time(t_, s_, lam)
        x_l = x_ + common.expand(l - t_, x_) * v_
        (a, b), (a_l, b_l) = _coefficients(t_, s_, kind), _coefficients(l, s_, kind)
        a, b, a_l, b_l, gap = (common.expand(time, x_) for time in (a, b, a_l, b_l, t_ - l))
        f_l = jax.lax.stop_gradient(a_l * x_l + b_l * net(x_l, l, s_, cond_))
        quotient = (a * x_ + b * out[n:] - f_l) / gap
        error = constrain(jnp.concatenate([error, quotient]))
        scale = jnp.concatenate([scale, (gap / (2 * jnp.abs(b))).reshape(-1)])
    mse = common.mean_square(error)
    loss = (scale * common.adaptive_weight(mse, config.p, config.eps) * mse).mean()
    velocity_mse = common.mean_square(slope * out[:n] - v[:n])
    return loss, {"mse": mse, "velocity_mse": velocity_mse}

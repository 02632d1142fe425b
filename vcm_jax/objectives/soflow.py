"""SoFlow, published as BiTCAM for video-to-audio: the flow's solution operator."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from vcm_jax.objectives import common, times
from vcm_jax.objectives.base import Passes, TargetGuidance
from vcm_jax.objectives.guidance import guided_target, smooth_decay
from vcm_jax.settings import choice, number, setting


@dataclasses.dataclass(frozen=True)
class SoFlowConfig(TargetGuidance):
    """Settings of the objective; the defaults are those of SoFlow's code on ImageNet.

    Of the settings of its S-16k and L-16k models BiTCAM's page gives the schedule of lambda alone:
    0.1 to 0.001, which is the default here (SoFlow's own ends at 0.002).

    Attributes:
      parameterisation: of f(x, t, s) = a x + b u(x, t, s). "euler" has a = 1, b = s - t;
        "trigonometric" has a = cos(pi/2 (s - t)), b = sin(pi/2 (s - t)).
      noising: "linear" has x_t = (1 - t) x0 + t x1; "trigonometric" has
        x_t = cos(pi/2 t) x0 + sin(pi/2 t) x1.
      guidance_scale: w; 1 is no guidance and no mixing.
      guidance, guidance_max, target_ema: see `TargetGuidance`. The decay also acts on
        conditioned guidance, whose interval is all times by default.
      mix_ratio: m, the fraction of the guided velocity that comes from the sample instead of the
        network.
      decay_start, decay_rate: where guidance begins to decay to 0 at t = 1, and kappa, how fast;
        see `guidance.smooth_decay`.
      p, eps: of the adaptive weights.
      instant_ratio: the fraction of the rows with s = t (the velocity loss).
      lambda_init, lambda_end: of the schedule that moves l towards t.
      time_mean, time_std: of the logit-normal t of the velocity loss.
      jump_mean, jump_std, later_mean, later_std: of the logit-normal t and s of the consistency
        loss.
    """

    name = "soflow"
    guidance_interval = (0.0, 1.0)
    parameterisation: str = setting("euler", choice("euler", "trigonometric"))
    noising: str = setting("linear", choice("linear", "trigonometric"))
    guidance_scale: float = setting(3.0, number(0))
    mix_ratio: float = setting(0.25, number(0, 1))
    decay_start: float = setting(0.8, number(0, 1))
    decay_rate: float = setting(0.025, number(above=0))
    p: float = setting(1.0, number(0))
    eps: float = setting(0.01, number(above=0))
    instant_ratio: float = setting(0.75, number(0, 1))
    lambda_init: float = setting(1 / 10, number(above=0, high=1))
    lambda_end: float = setting(1 / 1000, number(above=0, high=1))
    time_mean: float = setting(-0.2, number())
    time_std: float = setting(1.0, number(above=0))
    jump_mean: float = setting(0.2, number())
    jump_std: float = setting(0.8, number(above=0))
    later_mean: float = setting(-1.0, number())
    later_std: float = setting(0.8, number(above=0))

    def loss(self, u, *batch, **options):
        return soflow_loss(u, *batch, self, **options)

    def passes(self) -> Passes:
        later = 1 - self.instant_ratio
        guidance = self.guided_passes(self.instant_ratio, later) if self.guides else 0
        return Passes(guidance, elsewhere=later)

    def draw(self, key, batch_size: int, num_instant: int, step, steps: int):
        """t and s `B`, and the scalar lambda of the step, see `soflow_loss`."""
        keys = jax.random.split(key, 3)
        instant = jnp.arange(batch_size) < num_instant
        shape = (batch_size,)
        velocity_t = times.logit_normal(keys[0], shape, self.time_mean, self.time_std)
        t = times.logit_normal(keys[1], shape, self.jump_mean, self.jump_std)
        s = times.logit_normal(keys[2], shape, self.later_mean, self.later_std)
        t = jnp.maximum(jnp.where(instant, velocity_t, t), times.MIN_GAP)
        s = jnp.where(instant, t, jnp.minimum(s, t - times.MIN_GAP))
        return t, s, times.lambda_schedule(step, steps, self.lambda_init, self.lambda_end)

    def velocity(self, net):
        """u = (f - x) / (s - t), and the instantaneous velocity at s = t."""
        return velocity(net, self.parameterisation)

    def noised(self, x0, x1, t):
        return noised(x0, x1, t, self.noising)


def noised(x0, x1, t, kind: str):
    """x_t `B N C` of linear or trigonometric noising; t is `B`."""
    if kind == "linear":
        return common.noised(x0, x1, t)
    t = common.expand(t, x0)
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


def velocity(net, parameterisation: str):
    """The average velocity u = (f - x) / (s - t) of a network, and its limit at s = t.

    `net(x, t, s, cond)` -> `u(x, t, s, cond)`.
    """
    if parameterisation == "euler":
        return net

    def u(x, t, s, cond):
        out, (a, b) = net(x, t, s, cond), _coefficients(t, s, parameterisation)
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
    constrain=common.identity,
    guidance=None,
    target_u=None,
):
    """SoFlow's velocity loss on the s = t rows and its consistency loss on the others.

    In the first `num_instant` rows d/ds f(x_t, t, t) is trained towards the guided velocity v, with
    the weight 1 / (|db/ds| (mse + eps)^p). In the others f(x_t, t, s) is trained towards
    sg f(x_l, l, s), where l = t + (s - t) lam and x_l = x_t + (l - t) v. Their mse is that of the
    difference quotient (f(x_t, t, s) - sg f(x_l, l, s)) / (t - l), and their weight is
    (t - l) / (2 |b(t, s)| (mse + eps)^p). The 1/2 is that of the released gradients; BiTCAM's page
    does not have it.

    Network evaluations, in forward passes over the batch with r = num_instant / B: the
    unconditional velocity of all rows 1, the guided velocity and f(x_l, l, s) of the s < t rows
    2 (1 - r), and the differentiated pass. Passes that have no effect are left out: where w = 1 or
    m is 0 or 1.

    Arguments and results are those of `vcm_loss`, except that `u` is the network in f = a x + b u,
    `lam` is a scalar or `B`, and `aux` has no `target`.
    """
    n, batch_size = num_instant, x0.shape[0]
    common.check_rows(n, batch_size)
    x0, x1, t, s = map(common.at_least_float32, (x0, x1, t, s))
    net, later = common.wide(u), common.rows(n, None, constrain)
    kind, slope = config.parameterisation, _slope(config.parameterisation)

    x_t, v = noised(x0, x1, t, config.noising), _sample_velocity(x0, x1, t, config.noising)
    cond = common.select_rows(is_null, null_cond, cond)
    out = net(x_t, t, s, cond)
    unguided = not config.guides
    decay = smooth_decay(t, config.decay_start, config.decay_rate)

    target_net, known = common.for_targets(net, target_u, out[:n])

    def instant(x, t, s, c):
        return slope * target_net(x, t, s, c)

    v_g = guided_target(
        instant,
        slope * known,
        x_t,
        v,
        t,
        cond,
        null_cond,
        is_null,
        scale=1 if unguided else 1 + decay * (config.scale(guidance) - 1),
        mix_ratio=1.0 if unguided else config.mix_ratio,
        interval=config.interval(guidance),
        constrain=constrain,
    )
    error, scale = slope * out[:n] - v_g[:n], jnp.full(n, 1 / slope, x_t.dtype)
    if n < batch_size:
        x_, t_, s_, v_, cond_ = later((x_t, t, s, v_g, cond))
        l, _ = times.intermediate_time(t_, s_, lam)
        x_l = x_ + common.expand(l - t_, x_) * v_
        (a, b), (a_l, b_l) = _coefficients(t_, s_, kind), _coefficients(l, s_, kind)
        a, b, a_l, b_l, gap = (common.expand(time, x_) for time in (a, b, a_l, b_l, t_ - l))
        f_l = jax.lax.stop_gradient(a_l * x_l + b_l * target_net(x_l, l, s_, cond_))
        quotient = (a * x_ + b * out[n:] - f_l) / gap
        error = constrain(jnp.concatenate([error, quotient]))
        scale = jnp.concatenate([scale, (gap / (2 * jnp.abs(b))).reshape(-1)])
    mse = common.mean_square(error)
    loss = (scale * common.adaptive_weight(mse, config.p, config.eps) * mse).mean()
    velocity_mse = common.mean_square(slope * out[:n] - v[:n])
    return loss, {"mse": mse, "velocity_mse": velocity_mse}

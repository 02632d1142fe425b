"""Consistency models: jumps to the data alone, s = 0, as ECT, sCM and FACM train them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from vcm_jax.objectives import common, flow_maps, times
from vcm_jax.objectives.base import GuidedObjective, Passes
from vcm_jax.settings import TIME_INTERVAL, choice, integer, number, setting


@dataclasses.dataclass(frozen=True)
class ConsistencyConfig(flow_maps.TimeDerivative, GuidedObjective):
    """Settings of the objective; the defaults are those of FACM (arXiv 2507.03738).

    A batch has two kinds of rows: the s = t rows are flow matching, FACM's anchor, which also lets
    the run be sampled in Euler steps; the others jump to s = 0. FACM trains both on every row, at
    the times of the jumps; here they share the batch, and the anchor's times are `time_mean` and
    `time_std`. Several steps of a sampler jump to 0 and add fresh noise.

    - kind="facm": defaults.
    - kind="scm" (Lu and Song 2025): instant_ratio=0, guidance_scale=1, p=0,
      jump_times="logit_normal", jump_mean=-0.1, jump_std=1.6 (ImageNet latents; -0.3 and 1.4 on
      CIFAR-10). The learned weight of t is left out.
    - kind="ect" (Geng et al. 2025, arXiv 2406.14548), carried to the linear path: instant_ratio=0,
      guidance_scale=1, p=0.5, jump_times="logit_normal", jump_mean=-0.4, jump_std=2 (CIFAR-10;
      -0.1, 1.6, stages=4 and shrink=4 on ImageNet).

    sCM's and ECT's own P_mean is for data of standard deviation 0.5, ours is log 2 higher.

    Attributes:
      guidance, guidance_max, target_ema, guidance_scale, mix_ratio, guidance_interval,
        instant_ratio, time_mean, time_std: see `GuidedObjective`; the times are those of the
        s = t rows.
      p, eps: of the adaptive weight of the jumps, SoundVCM eq. 11 (for ECT of the summed error).
      derivative, derivative_step: of sCM and FACM, see `flow_maps.TimeDerivative`.
      kind: "facm", "scm" or "ect".
      jump_times: distribution of t: "arctan", (2 / pi) arctan(exp(normal)), or "logit_normal".
      jump_mean, jump_std: of that normal.
      relaxation: FACM's exponent p of 1 - (1 - t)^p.
      cosine: weight of FACM's 1 - cos(u, v) on the s = t rows.
      warmup: fraction of the run over which sCM's derivative grows to its full weight.
      stages, shrink: ECT's r approaches t in so many equal stages of the run, each by the factor q;
        the defaults are those of CIFAR-10.
    """

    name = "consistency"
    to_data = True
    guidance_scale: float = setting(1.75, number(0))
    mix_ratio: float = setting(1.0, number(0, 1))
    guidance_interval: tuple[float, float] = setting((0.0, 0.875), TIME_INTERVAL)
    p: float = setting(0.5, number(0))
    eps: float = setting(1e-3, number(above=0))
    instant_ratio: float = setting(0.5, number(0, 1))
    kind: str = setting("facm", choice("facm", "scm", "ect"))
    jump_times: str = setting("arctan", choice("arctan", "logit_normal"))
    jump_mean: float = setting(-0.8, number())
    jump_std: float = setting(1.6, number(above=0))
    relaxation: float = setting(0.5, number(above=0))
    cosine: float = setting(1.0, number(0))
    warmup: float = setting(0.1, number(above=0, high=1))
    stages: int = setting(8, integer(1))
    shrink: float = setting(2.0, number(above=1))

    @property
    def needs_jvp(self) -> bool:
        return self.kind != "ect" and self.derivative == "jvp"

    def loss(self, u, *batch, **options):
        return consistency_loss(u, batch, self, **options)

    def passes(self) -> Passes:
        later = 1 - self.instant_ratio
        elsewhere = later if self.kind == "ect" else later * self.derivative_passes
        return Passes(self.guided_passes(self.instant_ratio, later), elsewhere)

    def draw(self, key, batch_size: int, num_instant: int, step, steps: int):
        """t and s `B`, s = 0 in the jumps, and a scalar in (0, 1].

        The scalar is ECT's shrinking factor q^-(stage + 1), sCM's warm-up, or 1.
        """
        t, _, _ = super().draw(key, batch_size, num_instant, step, steps)
        normal = jax.random.normal(jax.random.fold_in(key, 1), (batch_size,))
        normal = self.jump_mean + self.jump_std * normal
        jump = jax.nn.sigmoid(normal)
        if self.jump_times == "arctan":
            jump = 2 / np.pi * jnp.arctan(jnp.exp(normal))
        instant = jnp.arange(batch_size) < num_instant
        t = jnp.where(instant, t, jnp.clip(jump, times.MIN_GAP, 1))
        part = jnp.asarray(step, jnp.float32) / steps
        if self.kind == "ect":
            stage = jnp.minimum(jnp.floor(part * self.stages), self.stages - 1)
            lam = self.shrink ** -(stage + 1)
        else:
            lam = jnp.minimum(1.0, part / self.warmup) if self.kind == "scm" else jnp.float32(1)
        return t, jnp.where(instant, t, 0.0), lam


def earlier_time(t, shrink):
    """ECT's r < t `B`, for the factor q^-(stage + 1), a scalar.

    In the noise levels tau = t / (1 - t) of its variance-exploding path,
    r = tau (1 - shrink (1 + 8 sigmoid(-tau / 2))), and at least 0. ECT's data have a standard
    deviation of 0.5, so that tau / 2 is its noise level.
    """
    tau = t / jnp.maximum(1 - t, 1e-6)
    r = tau * jnp.maximum(1 - shrink * (1 + 8 * jax.nn.sigmoid(-tau / 2)), 0)
    return jnp.minimum(r / (1 + r), t - times.MIN_GAP)


def consistency_loss(u, batch, config: ConsistencyConfig, **options):
    """Jumps to s = 0 are trained to agree along the flow; the s = t rows towards the velocity.

    With g = u - (v_g - t d/dt u), the derivative of the jump's end but for its sign, and without
    gradients in the targets (u here is u(x_t, t, 0)):

    - facm: u towards u - (1 - (1 - t)^p) clip(g, -1, 1), weight sin(pi t / 2).
    - scm: u towards u - g / (rms(g) + 0.1), g = sin(pi t / 2) (u - v_g + warm-up t d/dt u). The
      sine and the root mean square are those of FACM's reproduction. On this path the paper has
      (1 - t) sqrt((1 - t)^2 + t^2) and the norm. The norm makes all gradients smaller alike; the
      factor matters only where g is as small as 0.1.
    - ect: u towards the jump of a time r < t on the same pair, (x_t - f(x_r, r, 0)) / t, which is
      VCM's target with l = r. With p = 0.5 its gradient is twice that of the authors' weight on
      ImageNet, 1 / tau^2 + 1, times the distance |f(x_t, t, 0) - f(x_r, r, 0)|, for data of
      variance 1. On CIFAR-10 they have 1 / (t - r).

    Network evaluations, in forward passes over the batch with r = num_instant / B: the
    unconditional velocity of all rows 1, the tangent or u(x_r, r, 0) (1 - r), and the
    differentiated pass.

    `batch` and `options` are the arguments of `vcm_loss`, and results are as its own; s is 0 in the
    s < t rows, and `lam` is the scalar of `ConsistencyConfig.draw`.
    """
    begun = flow_maps.begin(u, batch, config, **options)
    kind, predicted, target, weight = config.kind, None, None, None
    if begun.has_jumps:
        predicted, target, weight = _jumps(begun, config)
    loss, aux = flow_maps.finish(
        begun,
        predicted,
        target,
        config,
        weight=weight,
        total=kind == "ect",
        plain_instant=True,
    )
    if kind == "facm" and config.cosine and begun.num_instant:
        n = begun.num_instant
        aligned = _cosine(begun.predicted, aux["target"][:n]).sum() / len(begun.v)
        loss = loss + config.cosine * (n / len(begun.v) - aligned)
    return loss, aux


def _jumps(begun: flow_maps.Begun, config: ConsistencyConfig):
    """(u, its target, weights) of the s < t rows."""
    x, t, s, v, lam = begun.x, begun.t, begun.s, begun.v_later, begun.lam
    sg = jax.lax.stop_gradient
    if config.kind == "ect":
        r = earlier_time(t, lam)
        predicted = begun.u(x, t, s, begun.cond)
        u_r = begun.target_u(x + common.expand(r - t, x) * v, r, s, begun.cond)
        share = common.expand((t - r) / t, x)
        # Of the distance in x, which is t times that in u, and its square root in the loss.
        weight = ((jnp.maximum(1 - t, 1e-6) / t) ** 2 + 1) * t
        return predicted, sg(share * v + (1 - share) * u_r), weight
    predicted, slope = flow_maps.along_flow(begun.u, x, t, s, begun.cond, v, config)
    slope, frozen, sine = sg(slope), sg(predicted), jnp.sin(np.pi / 2 * t)
    if config.kind == "facm":
        g = jnp.clip(frozen - v + common.expand(t, x) * slope, -1, 1)
        relaxed = common.expand(1 - (1 - jnp.minimum(t, 1)) ** config.relaxation, x)
        return predicted, frozen - relaxed * g, sine
    g = common.expand(sine, x) * (frozen - v + common.expand(lam * t, x) * slope)
    size = jnp.sqrt(common.mean_square(g))
    return predicted, frozen - g / common.expand(size + 0.1, g), None


def _cosine(a, b):
    """The mean over N of the cosine over channels: `B N C` -> `B`."""
    dot = (a * b).sum(-1)
    norms = jnp.sqrt((jnp.square(a).sum(-1) + 1e-12) * (jnp.square(b).sum(-1) + 1e-12))
    return (dot / norms).mean(-1)

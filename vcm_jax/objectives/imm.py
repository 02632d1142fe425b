"""Inductive moment matching: jumps agree in distribution (Zhou et al. 2025, arXiv 2503.07565)."""

import dataclasses

import jax
import jax.numpy as jnp

from vcm_jax.objectives import common, flow_maps, times
from vcm_jax.objectives.base import GuidedObjective, Passes
from vcm_jax.settings import TIME_INTERVAL, integer, number, setting


@dataclasses.dataclass(frozen=True)
class IMMConfig(GuidedObjective):
    """Settings of the objective; the defaults are the paper's where it has such a setting.

    In the jumps t is uniform in [0, 0.994] and s in [0, t]. The paper guides samples alone, with
    two evaluations a step. Here the s = t rows are flow matching towards the guided velocity, and
    the jumps start along it: `guidance_scale=1` and `instant_ratio=0` are the paper's loss. Its
    published code has no training; the loss follows the paper.

    Attributes:
      guidance, guidance_max, target_ema, guidance_scale, mix_ratio, guidance_interval,
        instant_ratio, time_mean, time_std: see `GuidedObjective`; the times are those of the
        s = t rows.
      p, eps: of the adaptive weight of the s = t rows.
      group: M, how many rows share t and s and are compared with each other. With 1 the loss is one
        of consistency; with 1 or 2 the paper's training collapses.
      halvings: k; r lies eta(0.994) / 2^k below t in eta = t / (1 - t), and 1e-4 in t at least (the
        paper's rule for low precision, I.6).
      weight_shift: b of the weight sigmoid(b - log SNR).
    """

    name = "imm"
    couples_rows = True
    guidance_scale: float = setting(1.0, number(0))
    mix_ratio: float = setting(1.0, number(0, 1))
    guidance_interval: tuple[float, float] = setting((0.0, 1.0), TIME_INTERVAL)
    p: float = setting(0.0, number(0))
    instant_ratio: float = setting(0.25, number(0, 1))
    group: int = setting(4, integer(1))
    halvings: int = setting(12, integer(1, 30))
    weight_shift: float = setting(4.0, number())

    def check_rows(self, num_instant: int, batch_size: int) -> None:
        later = batch_size - num_instant
        if later % self.group:
            raise ValueError(
                f"imm compares groups of objective.group = {self.group} rows: the {later} rows "
                "with s < t of a batch (or microbatch) do not divide into them"
            )

    def loss(self, u, *batch, **options):
        return imm_loss(u, batch, self, **options)

    def passes(self) -> Passes:
        later = 1 - self.instant_ratio
        return Passes(self.guided_passes(self.instant_ratio, later), later)

    def draw(self, key, batch_size: int, num_instant: int, step, steps: int):
        """t and s `B`, and None."""
        t, s, _ = super().draw(key, batch_size, num_instant, step, steps)
        # Jumps are long enough for r to lie between s and t.
        share = jax.random.uniform(jax.random.fold_in(key, 1), (2, batch_size))
        jump = jnp.maximum(LAST * share[0], 2 * times.MIN_GAP)
        end = jnp.minimum(jump * share[1], jump - 2 * times.MIN_GAP)
        instant = jnp.arange(batch_size) < num_instant
        return jnp.where(instant, t, jump), jnp.where(instant, s, end), None


LAST = 0.994  # the largest t of the jumps: eta = t / (1 - t) has no bound


def earlier_time(t, s, halvings: int):
    """r in [s, t) `B`, a fixed step in eta = t / (1 - t) below t, or 1e-4 below t."""
    eta = jnp.maximum(t / (1 - t) - LAST / (1 - LAST) / 2**halvings, 0)
    return jnp.maximum(jnp.minimum(eta / (1 + eta), t - times.MIN_GAP), s)


def time_weight(t, shift: float):
    """w(t) `B`: sigmoid(b - log SNR) (-d log SNR / dt) alpha / (2 (alpha^2 + sigma^2)).

    alpha = 1 - t, sigma = t, and log SNR = 2 log((1 - t) / t).
    """
    log_snr = 2 * (jnp.log1p(-t) - jnp.log(t))
    return jax.nn.sigmoid(shift - log_snr) / (t * ((1 - t) ** 2 + t**2))


def kernel(a, b, scale):
    """exp(-scale |a - b| / D) of all pairs in each group: `G M D` twice, `G` -> `G M M`."""
    squares = jnp.square(a[:, :, None] - b[:, None]).sum(-1)
    # The root has no derivative at 0, where every point meets itself.
    distance = jnp.sqrt(jnp.maximum(squares, 1e-16))
    return jnp.exp(-scale[:, None, None] * distance / a.shape[-1])


def imm_loss(u, batch, config: IMMConfig, **options):
    """Groups of M jumps from t and from r < t are matched in distribution.

    With a_i = f(x_t^i, t, s) and b_i = sg f(x_r^i, r, s) on the same pairs, the loss of a group is
    w(t) (mean K(a_i, a_j) + mean K(b_i, b_j) - 2 mean K(a_i, b_j)), an estimate of the squared
    maximum mean discrepancy, with K(a, b) = exp(-|a - b| / ((t - s) D)). The rows of a group take
    the times of its first one; t is at most 0.994.

    Network evaluations, in forward passes over the batch with r = num_instant / B: the
    unconditional velocity of all rows 1 (none for w = 1), f(x_r, r, s) (1 - r), and the
    differentiated pass.

    `batch` and `options` are the arguments of `vcm_loss`, and results are as its own; `lam` has no
    effect. `aux["mse"]` of a jump is that between u and the one with which it would land at b_i.

    Raises:
      ValueError: the s < t rows do not divide into groups.
    """
    x0, x1, t, s, *rest = batch
    n, size = options["num_instant"], config.group
    common.check_rows(n, x0.shape[0])
    config.check_rows(n, x0.shape[0])
    count = (x0.shape[0] - n) // size
    t, s = (jnp.concatenate([time[:n], jnp.repeat(time[n::size], size)]) for time in (t, s))
    t = jnp.where(jnp.arange(len(t)) < n, t, jnp.minimum(t, LAST))
    begun = flow_maps.begin(u, (x0, x1, t, s, *rest), config, **options)
    if not begun.has_jumps:
        return flow_maps.finish(begun, None, None, config)
    x, t, s, v = begun.x, begun.t, begun.s, begun.v_later
    r = earlier_time(t, s, config.halvings)
    predicted = begun.u(x, t, s, begun.cond)
    x_r = x + common.expand(r - t, x) * v
    landed = jax.lax.stop_gradient(flow_maps.jump(begun.target_u(x_r, r, s, begun.cond), x_r, r, s))
    target = (x - landed) / common.expand(t - s, x)
    _, aux = flow_maps.finish(begun, predicted, target, config)
    groups = lambda a: a.reshape(count, size, -1)
    a, b = groups(flow_maps.jump(predicted, x, t, s)), groups(landed)
    gap = groups(t - s)[:, 0, 0]
    within_a, within_b, across = (kernel(*pair, 1 / gap) for pair in ((a, a), (b, b), (a, b)))
    discrepancy = (within_a + within_b - 2 * across).mean((1, 2))
    jumps = time_weight(groups(t)[:, 0, 0], config.weight_shift) * discrepancy
    instant = aux["mse"][:n]
    instant = common.adaptive_weight(instant, config.p, config.eps) * instant
    return (instant.sum() + size * jumps.sum()) / len(begun.v), aux

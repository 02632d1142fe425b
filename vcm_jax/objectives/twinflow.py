"""TwinFlow: the network also learns the flow of its own samples, at negative times (2512.05150)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from vcm_jax.objectives import common, flow_maps, times
from vcm_jax.objectives.base import GuidedObjective, Passes
from vcm_jax.settings import TIME_INTERVAL, integer, number, setting


@dataclasses.dataclass(frozen=True)
class TwinFlowConfig(GuidedObjective):
    """Settings of the objective; the defaults are those of the authors' code.

    Its guided velocity v + 0.5 (u_c - u_null) has w = 2 and m = 0.5, and its distance
    mse / sqrt(mse + 1e-6) has p = 0.5. Its times are uniform; the logit-normal ones with a standard
    deviation of 1.7 are nearly so. A quarter of the rows has s = t here, where the code draws s
    between 0.95 t and t. The jumps from noise to data, t = 1, are not guided.

    The network is asked for negative times t = s. Its embedding of t is one of cos(f t) and
    sin(f t), whose sines tell -t from t, so that no network needs a change.

    Attributes:
      guidance, guidance_max, target_ema, guidance_scale, mix_ratio, guidance_interval, p, eps,
        instant_ratio, time_mean, time_std: see `GuidedObjective`.
      gap: length of the first leg, along the velocity, of the path that a jump is compared with.
      legs: jumps of the network on the rest of that path.
      matching: weight of the loss that makes both flows agree.
    """

    name = "twinflow"
    couples_rows = True  # the kind of a row is its place in the whole batch
    target_ema: float = setting(0.99, number(0, below=1))
    guidance_scale: float = setting(2.0, number(0))
    mix_ratio: float = setting(0.5, number(0, 1))
    guidance_interval: tuple[float, float] = setting((0.0, 0.9999), TIME_INTERVAL)
    p: float = setting(0.5, number(0))
    eps: float = setting(1e-6, number(above=0))
    instant_ratio: float = setting(0.25, number(0, 1))
    time_mean: float = setting(0.0, number())
    time_std: float = setting(1.7, number(above=0))
    gap: float = setting(0.01, number(above=0, high=0.5))
    legs: int = setting(2, integer(1))
    matching: float = setting(0.5, number(0))

    def loss(self, u, *batch, **options):
        return twinflow_loss(u, batch, self, **options)

    def passes(self) -> Passes:
        """Of batches whose s < t rows divide by 3."""
        third = (1 - self.instant_ratio) / 3
        guidance = self.guided_passes(self.instant_ratio, 2 * third)
        matching = 2 * third * (self.matching > 0)
        return Passes(guidance, 2 * third * self.legs + third + matching)

    def draw(self, key, batch_size: int, num_instant: int, step, steps: int):
        """t and s `B`, and random keys `B`; the jumps to the data have t = 1 and s = 0.

        s has no effect in the rows of the network's own samples.
        """
        keys, shape = jax.random.split(key), (batch_size,)
        t = times.logit_normal(keys[0], shape, self.time_mean, self.time_std)
        t = jnp.maximum(t, times.MIN_GAP)
        s = jnp.minimum(t * jax.random.uniform(keys[1], shape), t - times.MIN_GAP)
        third, place = (batch_size - num_instant) // 3, jnp.arange(batch_size)
        to_data = (place >= num_instant) & (place < num_instant + third)
        t = jnp.where(to_data, 1.0, t)
        s = jnp.where(to_data | (place >= batch_size - third), 0.0, s)
        s = jnp.where(place < num_instant, t, s)
        return t, s, jax.random.split(jax.random.fold_in(key, 1), batch_size)


def twinflow_loss(u, batch, config: TwinFlowConfig, **options):
    """Flow matching, jumps, the flow of the network's own samples, and agreement of both flows.

    With d(q) = q / sg(q + eps)^p, of the mean squared error over N and C, the rows are, in their
    order,

    1. s = t: u(x_t, t, t) is trained towards the guided velocity v_g;
    2. a third of the others, t = 1 and s = 0, and
    3. a third, any s < t: with l = max(t - gap, s), x_l = x_t + (l - t) v_g, and U the way of
       `legs` equal jumps of u from (x_l, l) to s, the residual g = ((t - s) u - U) / (t - l) - v_g
       vanishes for the exact flow but for a term of order gap, and u is trained towards
       sg(u - clip(g, -1, 1));
    4. a third, fakes: x^ = sg(z - u(z, 1, 0)) from fresh noise z, x_t = (1 - t) x^ + t x1, and
       u(x_t, -t, -t) is trained towards x1 - x^.

    1 to 3 have the weight 1 + tan((1 - t + s) pi / 2.5). To this, `matching` times the mean over
    the rows 2 is added of d between u = u(x1, 1, 0) and sg(u - clip(D, -1, 1)), where
    D = u(y, -t', -t') - u(y, t', t') at the sample x1 - u with fresh noise of a uniform time t',
    y. The difference of the velocities of both flows is that of their scores: samples move to
    where data are more likely than samples.

    Network evaluations, in forward passes over the batch with r = num_instant / B: the
    unconditional velocity of the rows 1 to 3, their guided one (with `target_ema`; else of the rows
    2 and 3), `legs` passes over the rows 2 and 3, u(z, 1, 0) (1 - r) / 3, two passes for D over the
    rows 2, and the differentiated pass.

    `batch` and `options` are the arguments of `vcm_loss`, and results are as its own; `lam` are
    random keys `B`. s of the fakes has no effect, nor have t and s of the rows 2. The
    authors' code takes `target_u` for v_g and U, as here.
    """
    x0, x1, t, s, keys, cond, null_cond, is_null = batch
    n, size = options["num_instant"], x0.shape[0]
    constrain = options.get("constrain", common.identity)
    common.check_rows(n, size)
    x1, t, s = map(common.at_least_float32, (x1, t, s))
    third = (size - n) // 3
    ones = jnp.ones(third, t.dtype)
    t = jnp.concatenate([t[:n], ones, t[n + third :]])
    s = jnp.concatenate([s[:n], 0 * ones, s[n + third :]])
    real, fake = (
        common.rows(*ends, constrain) for ends in ((0, size - third), (size - third, None))
    )
    options |= {"guidance": real(options.get("guidance"))}
    begun = flow_maps.begin(
        u, real((x0, x1, t, s, keys, cond, null_cond, is_null)), config, **options
    )
    if not begun.has_jumps:
        return flow_maps.finish(begun, None, None, config)
    predicted, target = _jumps(begun, config)
    _, aux = flow_maps.finish(begun, predicted, target, config)
    distance = lambda mse: common.adaptive_weight(mse, config.p, config.eps) * mse
    weight = 1 + jnp.tan((1 - (t - s)[: size - third]) * np.pi / 2.5)
    losses = weight * distance(aux["mse"])
    if not third:
        return losses.mean(), aux
    cond = common.select_rows(is_null, null_cond, cond)
    fake_mse, fake_target = _fakes(begun.u, *fake((x1, t, keys, cond)))
    loss = (losses.sum() + distance(fake_mse).sum()) / size
    if config.matching:
        first = common.rows(0, third, constrain)
        args = first((predicted, begun.x, begun.lam[n:], begun.cond))
        loss = loss + config.matching * distance(_disagreement(begun.u, *args)).mean()
    mse = begun.join(aux["mse"], fake_mse)
    return loss, aux | {"mse": mse, "target": begun.join(aux["target"], fake_target)}


def _fresh(keys, like):
    """Noise `B N C` of each row's own key."""
    return jax.vmap(lambda key: jax.random.normal(key, like.shape[1:], like.dtype))(keys)


def _jumps(begun: flow_maps.Begun, config: TwinFlowConfig):
    """u of the rows 2 and 3, and their target."""
    x, t, s, v = begun.x, begun.t, begun.s, begun.v_later
    predicted, clip = begun.u(x, t, s, begun.cond), lambda g: jnp.clip(g, -1, 1)
    l = jnp.maximum(t - config.gap, s)
    at, way = x + common.expand(l - t, x) * v, jnp.zeros_like(x)
    for leg in range(config.legs):
        start, end = (l + (s - l) * (i / config.legs) for i in (leg, leg + 1))
        moved = common.expand(start - end, x) * begun.target_u(at, start, end, begun.cond)
        at, way = at - moved, way + moved
    whole = common.expand(t - s, x) * predicted
    g = (whole - way) / common.expand(t - l, x) - v
    return predicted, jax.lax.stop_gradient(predicted - clip(g))


def _fakes(u, x1, t, keys, cond):
    """The squared errors of u on the flow of the network's samples, and its targets."""
    z, ones = _fresh(keys, x1), jnp.ones_like(t)
    sample = jax.lax.stop_gradient(flow_maps.jump(u(z, ones, 0 * ones, cond), z, ones, 0 * ones))
    target = x1 - sample
    predicted = u(common.noised(sample, x1, t), -t, -t, cond)
    return common.mean_square(predicted - target), target


def _disagreement(u, predicted, x1, keys, cond):
    """The mean square of clip(D), whose gradient moves `predicted` along -D."""
    frozen = jax.lax.stop_gradient(predicted)
    t = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1), dtype=x1.dtype))(keys)
    y = common.noised(x1 - frozen, _fresh(keys, x1), t)
    difference = u(y, -t, -t, cond) - u(y, t, t, cond)
    target = frozen - jnp.clip(difference, -1, 1)
    return common.mean_square(predicted - jax.lax.stop_gradient(target))

"""The loss that SplitMeanFlow and shortcut models share: one jump against two shorter ones."""

import jax.numpy as jnp

from vcm_jax.objectives import common
from vcm_jax.objectives.base import GuidedObjective, Passes
from vcm_jax.objectives.guidance import guided_target


def composed_passes(config: GuidedObjective) -> Passes:
    """The network evaluations of `composed_loss`."""
    later = 1 - config.instant_ratio
    return Passes(at_x_t=config.guided_passes(config.instant_ratio, 0) + later, elsewhere=later)


def composed_loss(
    u,
    batch,
    config: GuidedObjective,
    end_of,
    *,
    num_instant: int,
    constrain=common.identity,
    guidance=None,
    target_u=None,
):
    """The loss of an objective whose jump from t to s is trained towards its own two jumps over l.

    (t - s) target = (t - l) u(x_t, t, l) + (l - s) u(x_l, l, s), x_l = x_t + (l - t) u(x_t, t, l).
    The first `num_instant` rows have s = t and are trained towards the guided velocity.

    Network evaluations, in forward passes over the batch with r = num_instant / B: the
    unconditional velocity of the s = t rows r, both shorter jumps of the others 2 (1 - r), and the
    differentiated pass.

    Args:
      u, config, num_instant, constrain, guidance, target_u: as `vcm_loss`'s.
      batch: (x0, x1, t, s, l, cond, null_cond, is_null) of `vcm_loss`, with times l `B` between s
        and t in place of lam.
      end_of: `end_of(t, l)` -> the end time that the network is given for a jump from t to l.

    Returns:
      As `vcm_loss`.
    """
    x0, x1, t, s, l, cond, null_cond, is_null = batch
    n, batch_size = num_instant, x0.shape[0]
    common.check_rows(n, batch_size)
    x0, x1, t, s, l = map(common.at_least_float32, (x0, x1, t, s, l))
    u, first, later = common.wide(u), common.rows(0, n, constrain), common.rows(n, None, constrain)

    x_t, v = common.noised(x0, x1, t), x1 - x0
    cond = common.select_rows(is_null, null_cond, cond)
    u_ts = u(x_t, t, s, cond)
    target = v[:0]
    target_u, known = common.for_targets(u, target_u, u_ts[:n])
    if n:
        guidance = first(guidance)
        target = guided_target(
            target_u,
            known,
            *first((x_t, v, t, cond, null_cond, is_null)),
            scale=config.scale(guidance),
            mix_ratio=config.mix_ratio,
            interval=config.interval(guidance),
            constrain=constrain,
        )
    if n < batch_size:
        x_later, t_, s_, l_, cond_later = later((x_t, t, s, l, cond))
        u_tl = target_u(x_later, t_, end_of(t_, l_), cond_later)
        x_l = x_later + common.expand(l_ - t_, x_later) * u_tl
        u_ls = target_u(x_l, l_, end_of(l_, s_), cond_later)
        share = common.expand((t_ - l_) / (t_ - s_), u_tl)
        target = constrain(jnp.concatenate([target, share * u_tl + (1 - share) * u_ls]))
    return common.regression(u_ts, target, v, n, config.p, config.eps)

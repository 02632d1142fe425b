"""What the objectives share."""

import jax
import jax.numpy as jnp

from vcm_jax.objectives.guidance import mix_velocity, within

# What the objectives' settings may be, whichever objective has them.
_RANGES = {
    "guidance_scale": (lambda w: w >= 0, "must be >= 0"),
    "mix_ratio": (lambda m: 0 <= m <= 1, "must be in [0, 1]"),
    "guidance_interval": (
        lambda ends: len(ends) == 2 and 0 <= ends[0] <= ends[1] <= 1,
        "must be 0 <= low <= high <= 1",
    ),
    "p": (lambda p: p >= 0, "must be >= 0"),
    "eps": (lambda eps: eps > 0, "must be > 0"),
    "instant_ratio": (lambda r: 0 <= r <= 1, "must be in [0, 1]"),
    "time_std": (lambda std: std > 0, "must be > 0"),
    "later_std": (lambda std: std > 0, "must be > 0"),
    "lambda_init": (lambda lam: 0 < lam <= 1, "must be in (0, 1]"),
    "lambda_end": (lambda lam: 0 < lam <= 1, "must be in (0, 1]"),
}


def check_settings(config, **ranges) -> None:
    """Raises ValueError for a setting out of its range; `ranges` are those of this objective alone.

    Args:
      config: a dataclass of settings.
      **ranges: by the setting's name, (whether a value is good, what it must be).
    """
    for name, (good, message) in (_RANGES | ranges).items():
        if hasattr(config, name) and not good(getattr(config, name)):
            raise ValueError(f"objective.{name} {getattr(config, name)} {message}")


def check_rows(num_instant: int, batch_size: int) -> None:
    """Raises ValueError when `num_instant` rows are not within the batch."""
    if not 0 <= num_instant <= batch_size:
        raise ValueError(f"num_instant {num_instant} is not within the batch of {batch_size} rows")


def at_least_float32(x):
    """`x`, as float32 where it is narrower: times, losses and weights never lose precision."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(jnp.float32, x.dtype))


def wide(u):
    """`u`, with a result that is at least float32."""
    return lambda *args: at_least_float32(u(*args))


def expand(time, like):
    """`B` -> `B 1 ... 1` with the rank of `like`."""
    return time.reshape(time.shape + (1,) * (like.ndim - 1))


def select_rows(mask, if_true, if_false):
    """Rows of one pytree or another: mask bool `B`, leaves with a leading batch axis."""
    return jax.tree.map(lambda a, b: jnp.where(expand(mask, a), a, b), if_true, if_false)


def rows(start, stop, constrain=lambda tree: tree):
    """tree -> its rows `start` to `stop`, spread over the devices again by `constrain`."""
    return lambda tree: constrain(jax.tree.map(lambda a: a[start:stop], tree))


def noised(x0, x1, t):
    """x_t = (1 - t) x0 + t x1."""
    t = expand(t, x0)
    return (1 - t) * x0 + t * x1


def mean_square(x):
    """Mean over all axes but the first: `B ...` -> `B`."""
    return jnp.square(x).mean(tuple(range(1, x.ndim)))


def adaptive_weight(mse, p: float, eps: float):
    """sg(1 / (mse + eps)^p) (SoundVCM eq. 11), `B` -> `B`."""
    return jax.lax.stop_gradient((mse + eps) ** -p)


def guided_target(
    velocity,
    predicted,
    x_t,
    v,
    t,
    cond,
    null_cond,
    is_null,
    *,
    scale,
    mix_ratio: float,
    interval: tuple[float, float] = (0.0, 1.0),
    constrain=lambda tree: tree,
):
    """The velocity that rows aim at: guided where guidance applies, plain `v` elsewhere.

    v_mix of SoundVCM eq. 16. Passes of the network that have no effect are left out.

    Args:
      velocity: `velocity(x, t, cond)` -> `B N C`, the network's instant velocity.
      predicted: its result for the first rows, `n N C`, where that is there already.
      x_t, v: `B N C`, and t: `B`.
      cond, null_cond: with empty rows filled in, and all empty.
      is_null: bool `B`, rows whose target is plain.
      scale: w, a number or one a row; the number 1 is no guidance.
      mix_ratio: m; 1 does not use the network's own guided velocity.
      interval: times at which guidance and mixing apply, ends included.
      constrain: spreads joined rows over the devices again.

    Returns:
      `B N C`; no gradient goes through it.
    """
    n, batch_size = predicted.shape[0], x_t.shape[0]
    sg = jax.lax.stop_gradient
    v_uncond = v_guided = None
    guides = not (isinstance(scale, int | float) and scale == 1)
    if mix_ratio > 0 and guides:
        v_uncond = sg(velocity(x_t, t, null_cond))
    if mix_ratio < 1:
        v_guided = sg(predicted)
        if n < batch_size:
            rest = rows(n, None, constrain)
            v_guided = constrain(jnp.concatenate([v_guided, sg(velocity(*rest((x_t, t, cond))))]))
    scale = expand(scale, v) if getattr(scale, "ndim", 0) else scale
    mixed = mix_velocity(v, v_uncond, v_guided, scale, mix_ratio)
    return sg(select_rows(within(t, interval) & ~is_null, mixed, v))


def composed_loss(u, x0, x1, t, s, l, cond, null_cond, is_null, config, num_instant, constrain, at):
    """The loss of an objective whose jump from t to s aims at its own jumps t to l and l to s.

    (t - s) target = (t - l) u(x_t, t, l) + (l - s) u(x_l, l, s), x_l = x_t + (l - t) u(x_t, t, l).

    Args: as `vcm_loss`, and `l`, `B`; `at(t, l)` -> the end time that the network is asked for
    in place of l.

    Returns: as `vcm_loss`.
    """
    n, batch_size = num_instant, x0.shape[0]
    check_rows(n, batch_size)
    x0, x1, t, s, l = map(at_least_float32, (x0, x1, t, s, l))
    u, first, later = wide(u), rows(0, n, constrain), rows(n, None, constrain)

    x_t, v = noised(x0, x1, t), x1 - x0
    cond = select_rows(is_null, null_cond, cond)
    u_ts = u(x_t, t, s, cond)
    target = v[:0]
    if n:
        target = guided_target(
            lambda x, t, c: u(x, t, t, c), u_ts[:n], *first((x_t, v, t, cond, null_cond, is_null)),
            scale=config.guidance_scale, mix_ratio=config.mix_ratio,
            interval=config.guidance_interval, constrain=constrain,
        )  # fmt: skip
    if n < batch_size:
        x_later, t_, s_, l_, cond_later = later((x_t, t, s, l, cond))
        u_tl = u(x_later, t_, at(t_, l_), cond_later)
        x_l = x_later + expand(l_ - t_, x_later) * u_tl
        u_ls = u(x_l, l_, at(l_, s_), cond_later)
        part = expand((t_ - l_) / (t_ - s_), u_tl)
        target = constrain(jnp.concatenate([target, part * u_tl + (1 - part) * u_ls]))

    target = jax.lax.stop_gradient(target)
    mse = mean_square(u_ts - target)
    loss = (adaptive_weight(mse, config.p, config.eps) * mse).mean()
    velocity_mse = mean_square(u_ts[:n] - v[:n])
    return loss, {"mse": mse, "target": target, "velocity_mse": velocity_mse}

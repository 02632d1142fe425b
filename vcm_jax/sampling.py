"""From noise to data with any u(x, t, s, cond) (SoundVCM Algorithm 2)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from vcm_jax.objectives import common
from vcm_jax.objectives.guidance import guided_velocity as guided_velocity


def uniform_times(num_steps: int) -> np.ndarray:
    """1, (n-1)/n, ..., 0: the times of an n-step sampler, `num_steps + 1` numbers."""
    if num_steps < 1:
        raise ValueError(f"a sampler takes at least 1 step, not {num_steps}")
    return np.linspace(1, 0, num_steps + 1, dtype=np.float32)


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How a run is sampled; the defaults are the way its objective has it.

    Attributes:
      guidance_scale: Euler steps of the instant velocity with classifier-free guidance of this
        scale; None is the objective's own way, see `velocity_for`.
      guidance_interval: times at which that guidance applies; None is the objective's, or all
        where its guidance is in the weights.
      restart: BiTCAM's sampler, see `restart_sample`.

    Raises:
      ValueError: when a setting is out of its range.
    """

    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    restart: bool = False

    def __post_init__(self):
        ends = self.guidance_interval
        if self.guidance_scale is not None and not self.guidance_scale >= 0:
            raise ValueError(f"guidance_scale {self.guidance_scale} must be >= 0")
        if ends is not None and not (len(ends) == 2 and 0 <= ends[0] <= ends[1] <= 1):
            raise ValueError(f"guidance_interval {ends} must be 0 <= low <= high <= 1")

    def check(self, settings) -> None:
        """Raises ValueError when it does not fit the objective of these settings."""
        if self.guidance_interval and self.guidance_scale is None and not settings.instant_only:
            raise ValueError(
                f"guidance_interval needs guidance_scale: {settings.name} has its guidance in the "
                "weights"
            )

    def __call__(self, settings, net, x1, times, cond, null_cond, keys=None):
        """From the noise `x1` to data, as `sample`.

        Args:
          settings: of the objective that the network was trained with.
          net: `net(x, t, s, cond)` -> `B N C`.
          x1, times, cond: as `sample`'s.
          null_cond: the empty condition, with as many rows.
          keys: of the restarts' noise, one for each row.
        """
        u = velocity_for(settings, net, null_cond, self.guidance_scale, self.guidance_interval)
        if not self.restart:
            return sample(u, x1, times, cond)
        return restart_sample(u, x1, times, cond, keys, settings.noised)


OWN_SAMPLER = Sampler()


def repeat_rows(tree, size: int):
    """A pytree of one row, as `size` rows."""
    return jax.tree.map(lambda a: jnp.broadcast_to(a, (size, *a.shape[1:])), tree)


def check_times(times) -> tuple[float, ...]:
    """The times as a tuple of floats; raises ValueError as `sample`."""
    _intervals(times)
    return tuple(float(time) for time in times)


def _intervals(times):
    """(t, s) of every jump, `n 2`; the values are checked where they are known."""
    times = np.asarray(times, np.float32)
    if times.ndim != 1 or len(times) < 2 or not (np.diff(times) < 0).all():
        raise ValueError(f"times must decrease and be at least two, not {times.tolist()}")
    if times[0] > 1 or times[-1] < 0:
        raise ValueError(f"times must lie in [0, 1], not {times.tolist()}")
    return np.stack([times[:-1], times[1:]], 1)


def jump(u, x, t, s, cond):
    """x_s = x_t + (s - t) u(x_t, t, s, c), for scalar times."""
    rows = lambda time: jnp.full(x.shape[0], time, jnp.promote_types(jnp.float32, x.dtype))
    return x + (s - t) * u(x, rows(t), rows(s), cond)


def sample(u, x1, times, cond):
    """Jumps through the times, one evaluation of u each (SoundVCM Algorithm 2).

    Args:
      u: `u(x, t, s, cond)` -> `B N C`.
      x1: noise, or a sample at times[0], `B N C`.
      times: decreasing, within [0, 1]; `uniform_times(n)` are the paper's.
      cond: whatever u takes.

    Returns:
      The sample at times[-1], `B N C`.

    Raises:
      ValueError: when the times do not decrease or leave [0, 1].
    """
    body = lambda x, ts: (jump(u, x, ts[0], ts[1], cond), None)
    return jax.lax.scan(body, x1, jnp.asarray(_intervals(times)))[0]


def velocity_for(settings, net, null_cond, guidance_scale=None, guidance_interval=None):
    """What `sample` takes, from a network and the settings of the objective it was trained with.

    Objectives that know the instant velocity alone give an Euler step with classifier-free
    guidance, whose scale and interval are theirs unless given; the others' own average velocity
    has its guidance inside. A given scale makes an Euler step of those too.

    Args:
      settings: of the objective, e.g. a `VCMConfig`.
      net: `net(x, t, s, cond)` -> `B N C`.
      null_cond: the empty condition, with as many rows as the batch.
      guidance_scale, guidance_interval: see `guidance.guided_velocity`.
    """
    u = settings.velocity(net)
    if guidance_scale is None and not settings.instant_only:
        return u
    if guidance_scale is None:
        guidance_scale = settings.guidance_scale
    if guidance_interval is None:
        guidance_interval = settings.guidance_interval if settings.instant_only else (0.0, 1.0)
    return guided_velocity(u, null_cond, guidance_scale, guidance_interval)


def restart_sample(u, x1, times, cond, key, noised=common.noised):
    """Jumps to 0, noises to the next time, jumps again (BiTCAM's few-step sampler).

    As `sample`; the last time must be 0.

    Args:
      key: draws the fresh noise; one key, or one for each row.
      noised: (x0, x1, t) -> x_t, the noising that the run was trained with; linear by default.

    Raises:
      ValueError: as `sample`, or when the last time is not 0.
    """
    intervals = _intervals(times)
    if intervals[-1, 1] != 0:
        raise ValueError(f"a restart sampler ends at time 0, not {intervals[-1, 1]}")

    normal = lambda key, shape: jax.random.normal(key, shape, x1.dtype)

    def body(x, step):
        (t, s), i = step
        x0 = jump(u, x, t, jnp.zeros_like(t), cond)
        if key.ndim:
            row = lambda key: normal(jax.random.fold_in(key, i), x.shape[1:])
            noise = jax.vmap(row)(key)
        else:
            noise = normal(jax.random.fold_in(key, i), x.shape)
        return noised(x0, noise, jnp.full(x.shape[0], s, x0.dtype)), None

    steps = jnp.arange(len(intervals))
    return jax.lax.scan(body, x1, (jnp.asarray(intervals), steps))[0]

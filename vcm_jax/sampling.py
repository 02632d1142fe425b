"""From noise to data with any velocity u(x, t, s, cond) (SoundVCM Algorithm 2)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from vcm_jax.objectives import common
from vcm_jax.objectives.guidance import Guidance
from vcm_jax.objectives.guidance import guided_velocity as guided_velocity
from vcm_jax.settings import TIME_INTERVAL, number


def uniform_times(num_steps: int) -> np.ndarray:
    """1, (n-1)/n, ..., 0: the `num_steps + 1` times of a sampler with n equal steps.

    Raises:
      ValueError: for less than one step.
    """
    if num_steps < 1:
        raise ValueError(f"a sampler takes at least 1 step, not {num_steps}")
    return np.linspace(1, 0, num_steps + 1, dtype=np.float32)


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How a trained network is sampled; the defaults are what its objective prescribes.

    Objectives that learn the instantaneous velocity alone prescribe Euler steps with
    classifier-free guidance; the average velocity of the others has its guidance in the weights,
    or takes it as an input (`objective.guidance_input`).

    Attributes:
      guidance_scale: take Euler steps of the instantaneous velocity, with classifier-free guidance
        of this scale; None does what the objective prescribes. Where guidance is an input, this is
        what it is, and steps stay as they are.
      guidance_interval: times at which that guidance applies, both ends included. None takes the
        objective's interval, or all times if its guidance is in the weights.
      restart: use BiTCAM's sampler, see `restart_sample`. Objectives that learn jumps to the data
        alone (`objective.to_data`) prescribe it.

    Raises:
      ValueError: when a setting is out of its range.
    """

    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    restart: bool = False

    def __post_init__(self):
        for name, accepts in (("guidance_scale", number(0)), ("guidance_interval", TIME_INTERVAL)):
            value = getattr(self, name)
            if value is not None and not accepts.holds(value):
                raise ValueError(f"{name} must be {accepts.text}, not {value}")

    def check(self, objective) -> None:
        """Raises ValueError when the sampler does not fit the objective."""
        if (given := self.guidance_input(objective)) is not None:
            objective.check_guidance(given)
            return
        if self.guidance_interval and self.guidance_scale is None and not objective.instant_only:
            raise ValueError(
                f"guidance_interval needs guidance_scale: {objective.name} has its guidance in the "
                "weights"
            )

    def is_guided(self, objective) -> bool:
        """Whether it leads away from the empty condition, with an evaluation of its own."""
        if objective.guidance_input:
            return False
        scale = self.guidance_scale
        if scale is None:
            scale = objective.guidance_scale if objective.instant_only else 1
        return scale != 1

    def restarts(self, objective) -> bool:
        """Whether every step jumps to time 0, and fresh noise follows."""
        euler = self.guidance_scale is not None and not objective.guidance_input
        return self.restart or (objective.to_data and not euler)

    def guidance_input(self, objective) -> Guidance | None:
        """The guidance with which the network's conditions are encoded; None without such input."""
        if not objective.guidance_input:
            return None
        scale, interval = self.guidance_scale, self.guidance_interval
        scale = objective.guidance_scale if scale is None else scale
        return Guidance(scale, *(interval or objective.guidance_interval))

    def velocity(self, objective, net, null_cond):
        """The velocity that `sample` takes, from a network.

        Args:
          objective: the objective (its settings) that the network was trained with.
          net: `net(x, t, s, cond)` -> `B N C`.
          null_cond: the empty condition, with as many rows as the batch.
        """
        u = objective.velocity(net)
        scale, interval = self.guidance_scale, self.guidance_interval
        if objective.guidance_input or (scale is None and not objective.instant_only):
            return u
        if scale is None:
            scale = objective.guidance_scale
        if interval is None:
            interval = objective.guidance_interval if objective.instant_only else (0.0, 1.0)
        return guided_velocity(u, null_cond, scale, interval)

    def __call__(self, objective, net, x1, times, cond, null_cond, keys=None):
        """From the noise `x1` to the sample at times[-1], `B N C`.

        Args:
          objective, net, null_cond: as `velocity`'s.
          x1, times, cond: as `sample`'s.
          keys: random keys for the noise of a restart sampler, one for each row; None takes fixed
            ones.
        """
        u = self.velocity(objective, net, null_cond)
        if self.restarts(objective):
            keys = jax.random.key(0) if keys is None else keys
            return restart_sample(u, x1, times, cond, keys, objective.noised)
        return sample(u, x1, times, cond)


OWN_SAMPLER = Sampler()


def check_times(times) -> tuple[float, ...]:
    """The times as a tuple of floats; raises ValueError as `sample`."""
    intervals(times)
    return tuple(float(time) for time in times)


def intervals(times, restart: bool = False) -> np.ndarray:
    """(t, s) of every jump, float32 `n 2`; raises ValueError as `sample` or `restart_sample`."""
    times = np.asarray(times, np.float32)
    if times.ndim != 1 or len(times) < 2 or not (np.diff(times) < 0).all():
        raise ValueError(f"times must decrease and be at least two, not {times.tolist()}")
    if times[0] > 1 or times[-1] < 0:
        raise ValueError(f"times must lie in [0, 1], not {times.tolist()}")
    if restart and times[-1] != 0:
        raise ValueError(f"a restart sampler ends at time 0, not {times[-1]}")
    return np.stack([times[:-1], times[1:]], 1)


def jump(u, x, t, s, cond):
    """x_s = x_t + (s - t) u(x_t, t, s, c), for scalar times t and s: `B N C` -> `B N C`."""

    def rows(time):
        return jnp.full(x.shape[0], time, jnp.promote_types(jnp.float32, x.dtype))

    return x + (s - t) * u(x, rows(t), rows(s), cond)


def sample(u, x1, times, cond):
    """Jumps from time to time, with one evaluation of u each (SoundVCM Algorithm 2).

    Args:
      u: `u(x, t, s, cond)` -> `B N C`.
      x1: noise, or a sample at times[0], `B N C`.
      times: decreasing, within [0, 1]; the paper's are `uniform_times(n)`.
      cond: the condition that u takes.

    Returns:
      The sample at times[-1], `B N C`.

    Raises:
      ValueError: when the times do not decrease or leave [0, 1].
    """

    def body(x, interval):
        return jump(u, x, interval[0], interval[1], cond), None

    return jax.lax.scan(body, x1, jnp.asarray(intervals(times)))[0]


def fresh_noise(key, step, shape, dtype=jnp.float32):
    """The noise that `restart_sample` adds after jump number `step` (from 0)."""
    return jax.random.normal(jax.random.fold_in(key, step), shape, dtype)


def restart_sample(u, x1, times, cond, key, noised=common.noised):
    """Jumps to 0, adds fresh noise up to the next time, jumps again (BiTCAM's few-step sampler).

    Args:
      u, x1, times, cond: as `sample`'s; the last time must be 0.
      key: random key of the fresh noise; one key, or one for each row.
      noised: (x0, x1, t) -> x_t, the noising of training; linear by default.

    Returns:
      The sample at time 0, `B N C`.

    Raises:
      ValueError: as `sample`, or when the last time is not 0.
    """
    jumps = intervals(times, restart=True)

    def noise(i):
        if key.ndim:
            return jax.vmap(lambda each: fresh_noise(each, i, x1.shape[1:], x1.dtype))(key)
        return fresh_noise(key, i, x1.shape, x1.dtype)

    def body(x, step):
        (t, s), i = step
        x0 = jump(u, x, t, jnp.zeros_like(t), cond)
        return noised(x0, noise(i), jnp.full(x.shape[0], s, x0.dtype)), None

    steps = jnp.arange(len(jumps))
    return jax.lax.scan(body, x1, (jnp.asarray(jumps), steps))[0]

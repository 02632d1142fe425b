"""Flows whose average velocity is known, and a distance between samples."""

import jax.numpy as jnp
import numpy as np
from scipy.spatial.distance import cdist


class GaussianFlow:
    """The flow between x0 ~ N(mu, sigma^2), per element, and standard noise."""

    def __init__(self, mu=0.7, sigma=0.4):
        self.mu, self.sigma = mu, sigma

    def moments(self, t):
        return (1 - t) * self.mu, ((1 - t) ** 2 * self.sigma**2 + t**2) ** 0.5

    def velocity(self, x, t):
        """E[x1 - x0 | x_t = x]; t broadcasts against x."""
        mean, std = self.moments(t)
        slope = (t - (1 - t) * self.sigma**2) / std**2
        return slope * (x - mean) - self.mu

    def average_velocity(self, x, t, s):
        """(x_s - x_t) / (s - t) along the exact flow, and its limit at s = t."""
        (mean_t, std_t), (mean_s, std_s) = self.moments(t), self.moments(s)
        jump = mean_s + std_s / std_t * (x - mean_t) - x
        same = s == t
        return np.where(same, self.velocity(x, t), jump / np.where(same, 1, s - t))


class TraceableFlow(GaussianFlow):
    """The same, of whose average velocity JAX can take derivatives, as u(x, t, s, cond)."""

    def average(self, x, t, s, cond):
        """(x_s - x_t) / (s - t) with the division done by hand, so that s = t is nothing special.

        x `B N C`, t and s `B`. d_s - d_t = (d_s^2 - d_t^2) / (d_s + d_t), whose numerator is
        (s - t) ((s + t) - (2 - s - t) sigma^2).
        """
        del cond
        t, s = (jnp.asarray(time).reshape(-1, 1, 1) for time in (t, s))
        (mean_t, std_t), (_, std_s) = self.moments(t), self.moments(s)
        slope = ((s + t) - (2 - s - t) * self.sigma**2) / (std_s + std_t)
        return -self.mu + slope / std_t * (x - mean_t)


def energy_distance(x, y):
    """2 E|x - y| - E|x - x'| - E|y - y'| of two sets of points, `n d` and `m d`."""
    return 2 * cdist(x, y).mean() - cdist(x, x).mean() - cdist(y, y).mean()

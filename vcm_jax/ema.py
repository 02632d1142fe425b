"""EMA weights with power-function profiles, and their post-hoc reconstruction.

After EDM2 (Karras et al. 2024, section 3 and appendix C). EMA weights of width `sigma_rel` at time
T are the parameters averaged with the profile (gamma + 1) t^gamma / T^(gamma + 1), 0 <= t <= T.
"""

import jax
import jax.numpy as jnp
import numpy as np


def gamma_from_sigma_rel(sigma_rel: float) -> float:
    """The exponent gamma of the profile whose standard deviation is `sigma_rel` times its length.

    It is the largest real root of g^3 + 7 g^2 + (16 - u) g + (12 - u), u = sigma_rel^-2.

    Raises:
      ValueError: when `sigma_rel` is not above 0, or so large (above about 0.29) that no profile
        has that width.
    """
    if not 0 < sigma_rel < 12**-0.5:
        raise ValueError(f"sigma_rel {sigma_rel} must lie between 0 and {12**-0.5:.4f}")
    u = sigma_rel**-2
    return float(np.roots([1, 7, 16 - u, 12 - u]).real.max())


def update(average, params, step, gamma: float):
    """The EMA weights after a training step.

    average <- beta average + (1 - beta) params, beta = (1 - 1 / step)^(gamma + 1). At the first
    step beta is 0, so that the initial value has no influence.

    Args:
      average, params: EMA weights and parameters, pytrees of the same structure.
      step: number of the step; the first is 1.
      gamma: exponent of the profile.
    """
    return _blend(average, params, (1 - 1 / step) ** (gamma + 1))


def follow(average, params, step, decay: float):
    """EMA weights of constant decay, those of an objective's targets; arguments as `update`'s.

    average <- beta average + (1 - beta) params, beta = min(decay, 1 - 1 / step): a plain average of
    the first 1 / (1 - decay) steps, in which the initial value has no influence.
    """
    return _blend(average, params, jnp.minimum(decay, 1 - 1 / step))


def _blend(average, params, beta):
    return jax.tree.map(lambda a, p: (beta * a + (1 - beta) * p).astype(a.dtype), average, params)


def _inner_product(t_a, gamma_a, t_b, gamma_b):
    """The integral of the product of two profiles (EDM2 eq. 149)."""
    ratio = t_a / t_b
    exponent = np.where(t_a < t_b, gamma_b, -gamma_a)
    scale = (gamma_a + gamma_b + 1) * np.maximum(t_a, t_b)
    return (gamma_a + 1) * (gamma_b + 1) * ratio**exponent / scale


def posthoc_coefficients(
    snapshot_steps, snapshot_sigma_rels, target_step: float, target_sigma_rel: float
) -> np.ndarray:
    """Coefficients that combine stored EMA weights to those of another width (EDM2 algorithm 3).

    Args:
      snapshot_steps, snapshot_sigma_rels: step and width of every snapshot, `n` each.
      target_step: one of the steps.
      target_sigma_rel: the width to reconstruct.

    Returns:
      `n` float64 coefficients that sum to 1; those of snapshots after the target are 0.

    Raises:
      ValueError: when the lengths differ, or the target is not one of the steps.
    """
    steps = np.asarray(snapshot_steps, np.float64)
    if steps.ndim != 1 or steps.shape != np.shape(snapshot_sigma_rels) or not steps.size:
        raise ValueError(
            f"snapshot_steps {steps.shape} and snapshot_sigma_rels "
            f"{np.shape(snapshot_sigma_rels)} must have one entry for every snapshot"
        )
    if target_step not in steps:
        raise ValueError(f"target step {target_step} is not a snapshot's step: {np.unique(steps)}")
    used = steps <= target_step
    gammas = np.array([gamma_from_sigma_rel(sigma) for sigma in snapshot_sigma_rels])[used]
    t, target_gamma = steps[used], gamma_from_sigma_rel(target_sigma_rel)
    products = _inner_product(t[:, None], gammas[:, None], t[None], gammas[None])
    targets = _inner_product(t, gammas, np.float64(target_step), target_gamma)
    coefficients = np.zeros(steps.shape)
    coefficients[used] = np.linalg.solve(products, targets)
    return coefficients / coefficients.sum()

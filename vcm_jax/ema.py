"""Power-function moving averages of the parameters, and their post-hoc reconstruction.

EDM2 (Karras et al. 2024, section 3 and appendix C). The profile of an average of width
`sigma_rel` at time T is (gamma + 1) t^gamma / T^(gamma + 1), 0 <= t <= T.
"""

import jax
import numpy as np


def gamma_from_sigma_rel(sigma_rel: float) -> float:
    """The exponent of a profile whose standard deviation is `sigma_rel` of its length.

    The largest real root of g^3 + 7 g^2 + (16 - u) g + (12 - u), u = sigma_rel^-2.

    Raises:
      ValueError: when no profile is that wide (sigma_rel is above about 0.29) or it is <= 0.
    """
    if not 0 < sigma_rel < 12**-0.5:
        raise ValueError(f"sigma_rel {sigma_rel} must lie between 0 and {12**-0.5:.4f}")
    u = sigma_rel**-2
    return float(np.roots([1, 7, 16 - u, 12 - u]).real.max())


def update(average, params, step, gamma: float):
    """The average after step number `step` (the first is 1); pytrees of the same structure.

    beta = (1 - 1 / step)^(gamma + 1): 0 at the first step, so the initial value is forgotten.
    """
    beta = (1 - 1 / step) ** (gamma + 1)
    return jax.tree.map(lambda a, p: (beta * a + (1 - beta) * p).astype(a.dtype), average, params)


def _inner_product(t_a, gamma_a, t_b, gamma_b):
    """Integral of the product of two profiles (EDM2 eq. 149)."""
    ratio = t_a / t_b
    exponent = np.where(t_a < t_b, gamma_b, -gamma_a)
    scale = (gamma_a + gamma_b + 1) * np.maximum(t_a, t_b)
    return (gamma_a + 1) * (gamma_b + 1) * ratio**exponent / scale


def posthoc_coefficients(
    snapshot_steps, snapshot_sigma_rels, target_step: float, target_sigma_rel: float
) -> np.ndarray:
    """Weights of stored averages whose sum is an average of another width (EDM2 algorithm 3).

    Args:
      snapshot_steps, snapshot_sigma_rels: when each snapshot was stored, and its width; `n` each.
      target_step: one of the steps.
      target_sigma_rel: the width that is wanted.

    Returns:
      `n` float64 coefficients that sum to 1; those of snapshots later than the target are 0.

    Raises:
      ValueError: when the lengths differ or the target is not one of the steps.
    """
    steps = np.asarray(snapshot_steps, np.float64)
    if steps.ndim != 1 or steps.shape != np.shape(snapshot_sigma_rels) or not steps.size:
        raise ValueError(
            f"{steps.shape} steps and {np.shape(snapshot_sigma_rels)} widths: one width a snapshot"
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

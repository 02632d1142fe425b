import jax
import numpy as np
import pytest
from flows import GaussianFlow

from vcm_jax.sampling import guided_velocity, restart_sample, sample, uniform_times

FLOW = GaussianFlow()
NOISE = np.random.default_rng(0).standard_normal((5, 4, 3)).astype(np.float32)


def exact(x, t, s, cond):
    """The exact average velocity of the Gaussian flow."""
    t, s = t[:, None, None], s[:, None, None]
    (mean_t, std_t), (mean_s, std_s) = FLOW.moments(t), FLOW.moments(s)
    jump = mean_s + std_s / std_t * (x - mean_t) - x
    same = s == t
    return jax.numpy.where(same, FLOW.velocity(x, t), jump / jax.numpy.where(same, 1, s - t))


@pytest.mark.parametrize("times", [uniform_times(1), uniform_times(4), (1.0, 0.7, 0.1, 0.0)])
def test_the_exact_average_velocity_lands_on_the_data_in_any_number_of_steps(times):
    found = jax.jit(lambda x: sample(exact, x, times, None))(NOISE)
    np.testing.assert_allclose(found, FLOW.mu + FLOW.sigma * NOISE, atol=2e-6)


def test_a_sampler_may_stop_before_the_data():
    found = sample(exact, NOISE, (1.0, 0.5), None)
    mean, std = FLOW.moments(0.5)
    np.testing.assert_allclose(found, mean + std * NOISE, atol=1e-6)


def test_euler_with_guidance_converges_at_first_order():
    """With c added to the velocity and null taking it away, guidance w shifts the data by -w c."""
    u = lambda x, t, s, cond: exact(x, t, t, None) + cond
    errors = []
    for n in (20, 40):
        guided = guided_velocity(u, -0.1, 3.0)  # 3 (v + 0.2) - 2 (v - 0.1) = v + 0.8
        flow = sample(guided, NOISE, uniform_times(n), 0.2)
        plain = sample(lambda x, t, s, cond: exact(x, t, t, None) + 0.8, NOISE, uniform_times(n), 0)
        np.testing.assert_allclose(flow, plain, atol=1e-5)
        euler = sample(lambda *a: exact(a[0], a[1], a[1], None), NOISE, uniform_times(n), None)
        errors.append(np.abs(euler - (FLOW.mu + FLOW.sigma * NOISE)).max())
    assert 1.7 < errors[0] / errors[1] < 2.3


def test_restart_keeps_the_distribution_and_forgets_the_noise():
    noise = np.random.default_rng(1).standard_normal((1, 20_000, 1)).astype(np.float32)
    found = restart_sample(exact, noise, uniform_times(4), None, jax.random.key(0))
    np.testing.assert_allclose([found.mean(), found.std()], [FLOW.mu, FLOW.sigma], atol=0.01)
    assert np.corrcoef(found.ravel(), noise.ravel())[0, 1] < 0.5
    one = restart_sample(exact, noise, uniform_times(1), None, jax.random.key(0))
    np.testing.assert_allclose(one, FLOW.mu + FLOW.sigma * noise, atol=1e-5)


def test_bad_times():
    for times in ((0.0, 1.0), (1.0,), (1.0, 1.0), (1.2, 0.0)):
        with pytest.raises(ValueError, match="times"):
            sample(exact, NOISE, times, None)
    with pytest.raises(ValueError, match="at least 1 step"):
        uniform_times(0)
    with pytest.raises(ValueError, match="ends at time 0"):
        restart_sample(exact, NOISE, (1.0, 0.5), None, jax.random.key(0))

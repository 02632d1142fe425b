"""Samplers: exact flows, guidance, restarts, and the search for times."""

import itertools

import jax
import numpy as np
import pytest
from flows import GaussianFlow

from vcm_jax.objectives import make_settings
from vcm_jax.sampling import (
    Sampler,
    guided_velocity,
    restart_sample,
    sample,
    uniform_times,
)
from vcm_jax.search_times import best_path, jump_errors, search

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

    def shifted(x, t, s, cond):
        return exact(x, t, t, None) + cond

    errors = []
    for n in (20, 40):
        guided = guided_velocity(shifted, -0.1, 3.0)  # 3 (v + 0.2) - 2 (v - 0.1) = v + 0.8
        flow = sample(guided, NOISE, uniform_times(n), 0.2)
        plain = sample(shifted, NOISE, uniform_times(n), 0.8)
        np.testing.assert_allclose(flow, plain, atol=1e-5)
        euler = sample(shifted, NOISE, uniform_times(n), 0.0)
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


def test_restart_takes_a_key_for_each_row_and_the_noising_of_the_run():
    keys = jax.random.split(jax.random.key(3), 5)

    def run(rows):
        return restart_sample(exact, NOISE[rows], (1.0, 0.6, 0.0), None, keys[rows])

    whole = run(np.arange(5))
    np.testing.assert_allclose(whole[np.array([3, 1])], run(np.array([3, 1])), atol=1e-6)
    assert np.abs(whole[0] - run(np.array([1]))[0]).max() > 1e-3
    seen = []

    def noised(x0, x1, t):
        seen.append((x0.shape, t.shape))
        return x0 + 0 * x1

    found = restart_sample(exact, NOISE, (1.0, 0.5, 0.0), None, keys, noised)
    assert seen[0] == (NOISE.shape, (5,))
    # Without noise: the flow from t = 0.5 to 0, started from the data of the first jump.
    mean, std = FLOW.moments(0.5)
    once = FLOW.mu + FLOW.sigma * NOISE
    np.testing.assert_allclose(found, FLOW.mu + FLOW.sigma / std * (once - mean), atol=1e-5)


def test_guidance_in_an_interval():
    calls = []

    def u(x, t, s, cond):
        calls.append(cond)
        return 0 * x + cond

    t = np.float32([0.2, 0.5, 0.9, 1.0, 0.8])
    found = guided_velocity(u, 1.0, 3.0, (0.5, 0.9))(NOISE, t, t, 2.0)
    np.testing.assert_allclose(found[:, 0, 0], [2, 4, 4, 2, 4])
    assert calls == [2.0, 1.0]
    calls.clear()
    guided_velocity(u, 1.0, 1)(NOISE, t, t, 2.0)
    assert calls == [2.0], "without guidance the empty condition costs nothing"


def test_the_objective_says_how_its_network_is_sampled():
    """With u = s - t + cond average and instantaneous velocities differ, and so does guidance."""

    def net(x, t, s, cond):
        return (s - t)[:, None, None] + cond + 0 * x

    def ask(settings, *args):
        u = Sampler(*args).velocity(settings, net, -1.0)
        return u(NOISE, np.ones(5, np.float32), np.zeros(5, np.float32), 2.0)[0, 0, 0]

    assert ask(make_settings("vcm")) == 1.0  # -1 + 2
    assert ask(make_settings("vcm"), 1.0) == 2.0  # an Euler step
    assert ask(make_settings("vcm"), 3.0) == 8.0  # 3 * 2 - 2 * -1
    assert ask(make_settings("vcm"), 3.0, (0.0, 0.5)) == 2.0
    for name in ("flow_matching", "wcfm"):
        assert ask(make_settings(name, guidance_scale=2.0)) == 5.0
        assert ask(make_settings(name, guidance_scale=2.0, guidance_interval=(0.0, 0.9))) == 2.0
    assert ask(make_settings("reflow")) == 2.0
    assert ask(make_settings("soflow")) == 1.0
    x1 = np.ones((1, 1, 1), np.float32)
    settings = make_settings("soflow", parameterisation="trigonometric")
    one = Sampler()(settings, lambda x, t, s, c: 0 * x + 5, x1, (1.0, 0.0), None, None)
    np.testing.assert_allclose(one, -5.0, atol=1e-5)  # cos(-pi/2) x + sin(-pi/2) 5


def test_samplers_that_do_not_fit():
    with pytest.raises(ValueError, match="needs guidance_scale: vcm has its guidance"):
        Sampler(guidance_interval=(0.0, 0.5)).check(make_settings("vcm"))
    Sampler(guidance_interval=(0.0, 0.5)).check(make_settings("flow_matching"))
    with pytest.raises(ValueError, match="guidance_interval"):
        Sampler(guidance_interval=(0.5, 0.2))
    with pytest.raises(ValueError, match="guidance_scale"):
        Sampler(guidance_scale=-1.0)


def test_guidance_as_an_input_is_encoded_with_the_condition_and_costs_no_evaluation():
    conditioned = make_settings("vcm", guidance="conditioned", guidance_scale=3.0)
    assert Sampler().guidance_input(conditioned) == (3.0, 0.0, 0.8)
    assert Sampler(2.0, (0.1, 0.9)).guidance_input(conditioned) == (2.0, 0.1, 0.9)
    assert Sampler(2.0).guidance_input(make_settings("vcm")) is None
    assert not Sampler(2.0).is_guided(conditioned) and Sampler(2.0).is_guided(make_settings("vcm"))
    seen = []

    def net(x, t, s, cond):
        seen.append((s, cond))
        return 0 * x

    Sampler(2.0).velocity(conditioned, net, None)(NOISE, 1.0, 0.0, "cond")
    assert seen == [(0.0, "cond")], "the network's own jump, not an Euler step"
    for sampler, message in (
        (Sampler(9.0), r"^guidance_scale 9 is not in \[1, 8\], the range that conditioned"),
        (Sampler(0.5), r"guidance_scale 0.5 is not in \[1, 8\]"),
        (Sampler(2.0, (0.6, 0.8)), r"0.6,0.8: .* low end in \[0, 0.5\] and a high end in \[0.5, 1"),
        (Sampler(None, (0.0, 0.4)), "guidance_interval 0,0.4"),
    ):
        with pytest.raises(ValueError, match=message):
            sampler.check(conditioned)
    Sampler(8.0, (0.5, 0.5)).check(conditioned)
    Sampler(9.0).check(make_settings("vcm", guidance="conditioned", guidance_max=10.0))


def test_the_best_path_is_that_of_all_paths():
    rng = np.random.default_rng(0)
    errors = rng.random((9, 9))
    for n in (1, 3, 8):
        paths = [(0, *inner, 8) for inner in itertools.combinations(range(1, 8), n - 1)]
        costs = [sum(errors[i, j] for i, j in itertools.pairwise(path)) for path in paths]
        assert tuple(best_path(errors, n)) == paths[np.argmin(costs)]
    with pytest.raises(ValueError, match="9 steps do not fit a grid of 8"):
        best_path(errors, 9)


def test_searched_times_beat_equal_steps():
    """Euler steps on the Gaussian flow, whose velocity turns most where the data begins."""

    def euler(x, t, s, cond):
        return exact(x, t, t, cond)

    times, (found, equal) = search(euler, NOISE, None, 4, 32)
    assert times[0] == 1 and times[-1] == 0 and len(times) == 5 and (np.diff(times) < 0).all()
    assert found < 0.8 * equal
    errors, points = jump_errors(exact, NOISE, (1.0, 0.5, 0.0), None)
    assert np.nanmax(errors) < 1e-5 and np.isnan(errors[1, 0]) and len(points) == 3

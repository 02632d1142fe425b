"""Rectified flow: exact pairs make one Euler step exact."""

import jax
import numpy as np
import pytest
from small_batches import (
    FLOW,
    batch,
    check_pairs_on_the_flow,
    linear_net,
    loss_of,
    rows_of_passes,
    trained_passes,
)

from vcm_jax.objectives import make_settings


def test_there_is_no_error_on_pairs_with_the_velocity_of_the_network():
    check_pairs_on_the_flow("reflow")


def straight(x, t, s, cond):
    """The velocity of the rectified flow of `FLOW`, whose trajectories are lines."""
    t = t[:, None, None]
    x1 = (x - (1 - t) * FLOW.mu) / ((1 - t) * FLOW.sigma + t)
    return (1 - FLOW.sigma) * x1 - FLOW.mu


def test_with_the_exact_teacher_one_euler_step_is_exact():
    mu, sigma = FLOW.mu, FLOW.sigma
    with jax.enable_x64(True):
        _, x1, t, _ = batch()
        x0 = mu + sigma * x1  # where the flow takes x1
        assert loss_of("reflow", straight, x0, x1, t, t, None, num_instant=6)[0] < 1e-24
        one = x1 - straight(x1, np.ones(6), np.ones(6), None)
        np.testing.assert_allclose(one, x0, atol=1e-12)


def test_annealing_turns_flow_matching_into_reflow():
    """At b = 1 the noise is fresh, at b = 0 the teacher's; rows draw theirs by their own keys."""
    half = make_settings("reflow", anneal=0.5)
    draws = [half.draw(jax.random.key(0), 6, 6, k, 100)[2] for k in (0, 25, 50, 90)]
    np.testing.assert_allclose([share for share, _ in draws], [1, 0.5, 0, 0])
    x0, x1, t, _ = batch(dtype=np.float32)
    seen = []

    def net(x, t, s, cond):
        seen.append(x)
        return 0 * x

    def velocity(draw, rows=slice(None)):
        args = (x0[rows], x1[rows], t[rows], t[rows], draw)
        return loss_of("reflow", net, *args, num_instant=len(t[rows]), anneal=0.5)[1]["target"]

    np.testing.assert_allclose(velocity(draws[2]), x1 - x0, atol=1e-6)
    fresh, mixed = velocity(draws[0]) + x0, velocity(draws[1]) + x0
    np.testing.assert_allclose(mixed, np.sqrt(0.75) * x1 + 0.5 * fresh, atol=1e-5)
    assert np.abs(np.corrcoef(fresh.ravel(), x1.ravel())[0, 1]) < 0.5
    time = t[:, None, None]
    np.testing.assert_allclose(seen[-1], (1 - time) * x0 + time * mixed, atol=1e-5)
    some = velocity((draws[0][0], draws[0][1][2:4]), slice(2, 4))
    np.testing.assert_array_equal(some, (fresh - x0)[2:4].astype(some.dtype))
    assert make_settings("reflow").draw(jax.random.key(0), 6, 6, 0, 100)[2] is None


def test_two_legs_of_a_straight_flow_are_one_jump():
    """Where the teacher's flow is straight, its one step leaves no error in either loss."""
    x0, x1, _, _ = batch()
    with jax.enable_x64(True):
        x0, one, m = FLOW.mu + FLOW.sigma * x1, np.ones(6), np.linspace(0.2, 0.8, 6)

        def ask(teacher):
            options = {"teacher_u": teacher}
            return loss_of("reflow", straight, x0, x1, one, one, m, 6, drawn=options, two_leg=1.0)

        assert ask(straight)[0] < 1e-24
        loss, aux = ask(FLOW.average)  # the same samples, on curved ways
        assert aux["mse"].max() < 1e-24 and loss > 1e-4


def test_the_gradient_of_the_two_legs_by_hand():
    x0, x1, _, _ = batch(dtype=np.float32)
    one, m = np.ones(6, np.float32), np.linspace(0.2, 0.8, 6, dtype=np.float32)
    zero, share = {"c": 0.0}, m[:, None, None]
    teacher = lambda *args: 0.7 * linear_net(*args)

    def loss(theta):
        net = lambda *args: theta * linear_net(*args)
        options = {"teacher_u": teacher}
        return loss_of("reflow", net, x0, x1, one, one, m, 6, drawn=options, two_leg=0.5)[0]

    def by_hand(theta):
        u, frozen = (f * linear_net(x1, one, one, zero) for f in (theta, 1.3))
        legs = (1 - share) * frozen + share * teacher(x1 - (1 - share) * frozen, m, m, zero)
        return ((u - (x1 - x0)) ** 2 + 0.5 * (u - legs) ** 2).mean()

    np.testing.assert_allclose(loss(1.3), by_hand(1.3), rtol=1e-5)
    np.testing.assert_allclose(jax.grad(loss)(1.3), jax.grad(by_hand)(1.3), rtol=1e-5)


def test_what_two_legs_draw():
    ours = make_settings("reflow", two_leg=1.0)
    t, s, m = ours.draw(jax.random.key(0), 2000, 2000, 0, 1)
    assert (t == 1).all() and (s == 1).all()
    np.testing.assert_allclose([m.min(), m.mean(), m.max()], [0.2, 0.5, 0.8], atol=0.01)
    assert ours.teacher_velocity == "guided" and not make_settings("reflow").teacher_velocity
    with pytest.raises(ValueError, match="anneal and objective.two_leg are stages"):
        make_settings("reflow", two_leg=1.0, anneal=0.5)


def test_it_costs_one_pass():
    assert rows_of_passes("reflow") == [8]
    assert trained_passes("reflow") == ([0], 8)


def test_settings_out_of_range():
    with pytest.raises(ValueError, match="objective.teacher_steps"):
        make_settings("reflow", teacher_steps=0)

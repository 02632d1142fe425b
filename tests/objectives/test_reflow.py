"""Rectified flow: exact pairs make one Euler step exact."""

import jax
import numpy as np
import pytest
from small_batches import (
    FLOW,
    batch,
    check_pairs_on_the_flow,
    loss_of,
    rows_of_passes,
    trained_passes,
)

from vcm_jax.objectives import make_settings


def test_there_is_no_error_on_pairs_with_the_velocity_of_the_network():
    check_pairs_on_the_flow("reflow")


def test_with_the_exact_teacher_one_euler_step_is_exact():
    mu, sigma = FLOW.mu, FLOW.sigma

    def straight(x, t, s, cond):
        t = t[:, None, None]
        x1 = (x - (1 - t) * mu) / ((1 - t) * sigma + t)
        return (1 - sigma) * x1 - mu

    with jax.enable_x64(True):
        _, x1, t, _ = batch()
        x0 = mu + sigma * x1  # where the flow takes x1
        assert loss_of("reflow", straight, x0, x1, t, t, None, num_instant=6)[0] < 1e-24
        one = x1 - straight(x1, np.ones(6), np.ones(6), None)
        np.testing.assert_allclose(one, x0, atol=1e-12)


def test_it_costs_one_pass():
    assert rows_of_passes("reflow") == [8]
    assert trained_passes("reflow") == ([0], 8)


def test_settings_out_of_range():
    with pytest.raises(ValueError, match="objective.teacher_steps"):
        make_settings("reflow", teacher_steps=0)

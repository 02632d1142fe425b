"""Shortcut models: their identity, their cost, the grid of their jumps."""

import jax
import numpy as np
import pytest
from small_batches import (
    batch,
    check_exact_identity,
    check_weight_and_guidance_of_composed_jumps,
    linear_net,
    loss_of,
    rows_of_passes,
    trained_passes,
)

from vcm_jax.objectives import make_settings
from vcm_jax.objectives.shortcut import ShortcutConfig


def test_the_exact_flow_satisfies_its_identity():
    check_exact_identity("shortcut")


@pytest.mark.parametrize("num_instant, passes", [(6, [8, 6, 2, 2]), (0, [8, 8, 8])])
def test_no_row_pays_for_a_pass_that_it_does_not_need(num_instant, passes):
    assert rows_of_passes("shortcut", num_instant) == passes


def test_only_the_trained_prediction_has_a_gradient():
    assert trained_passes("shortcut") == ([0], 8)


def test_composed_jumps_are_weighted_and_guided_where_they_should_be():
    check_weight_and_guidance_of_composed_jumps("shortcut")


def test_the_finest_halves_are_instantaneous_velocities():
    asked = []

    def net(x, t, s, cond):
        asked.append(np.asarray(t - s))
        return linear_net(x, t, s, cond)

    x0, x1, _, _ = batch(2)
    t, s = np.float32([0.5, 0.5]), np.float32([0.5 - 2 / 8, 0.5 - 2 / 4])
    loss_of("shortcut", net, x0, x1, t, s, None, finest=8)
    np.testing.assert_allclose(asked, [[0.25, 0.5], [0, 0.25], [0, 0.25]], atol=1e-6)


def test_the_grid_of_jumps():
    t, s, _ = ShortcutConfig(finest=8).draw(jax.random.key(1), 6000, 0, 0, 1)
    lengths, counts = np.unique(t - s, return_counts=True)
    np.testing.assert_allclose(lengths, [0.25, 0.5, 1])
    assert counts.min() > 1800
    np.testing.assert_allclose((t / (t - s)) % 1, 0, atol=1e-6)


def test_settings_out_of_range():
    with pytest.raises(
        ValueError, match="objective.finest must be a power of 2 in .2, 4096., not 96"
    ):
        make_settings("shortcut", finest=96)

"""Flow matching: its minimum, its cost, its defaults."""

import pytest
from small_batches import check_pairs_on_the_flow, rows_of_passes, trained_passes

from vcm_jax.objectives import make_settings


def test_there_is_no_error_on_pairs_with_the_velocity_of_the_network():
    check_pairs_on_the_flow("flow_matching")


def test_it_costs_one_pass():
    assert rows_of_passes("flow_matching") == [8]
    assert trained_passes("flow_matching") == ([0], 8)


def test_mmaudio_s_distribution_of_times():
    assert make_settings("flow_matching").time_mean == 0.0


def test_settings_out_of_range():
    with pytest.raises(ValueError, match="objective.guidance_interval"):
        make_settings("flow_matching", guidance_interval=(0.9, 0.1))

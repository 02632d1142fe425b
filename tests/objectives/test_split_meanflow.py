"""SplitMeanFlow: its identity, its cost, where guidance and weights act."""

import jax
import pytest
from small_batches import (
    check_exact_identity,
    check_weight_and_guidance_of_composed_jumps,
    rows_of_passes,
    trained_passes,
)

from vcm_jax.objectives import make_settings


def test_the_exact_flow_satisfies_its_identity():
    check_exact_identity("split_meanflow")


@pytest.mark.parametrize(
    "settings, passes", [({}, [8, 6, 2, 2]), (dict(guidance_scale=1.0), [8, 2, 2])]
)
def test_no_row_pays_for_a_pass_that_it_does_not_need(settings, passes):
    assert rows_of_passes("split_meanflow", **settings) == passes


def test_only_the_trained_prediction_has_a_gradient():
    assert trained_passes("split_meanflow") == ([0], 8)


def test_composed_jumps_are_weighted_and_guided_where_they_should_be():
    check_weight_and_guidance_of_composed_jumps("split_meanflow")


def test_intervals_are_split_anywhere():
    _, _, lam = make_settings("split_meanflow").draw(jax.random.key(0), 4000, 1000, 50, 100)
    assert lam.shape == (4000,) and 0.45 < lam.mean() < 0.55


def test_settings_out_of_range():
    with pytest.raises(ValueError, match="objective.instant_ratio"):
        make_settings("split_meanflow", instant_ratio=2.0)

"""Guidance drawn for each row of a batch, as an input of the network."""

import dataclasses

import jax
import numpy as np
import pytest
from small_batches import batch, linear_net, loss_of, rows_of_passes

from vcm_jax.objectives import OBJECTIVES, make_settings
from vcm_jax.objectives.base import TargetGuidance
from vcm_jax.objectives.guidance import Guidance, draw_guidance

GUIDING = [name for name, cls in OBJECTIVES.items() if issubclass(cls, TargetGuidance)]


def test_drawn_guidance():
    scale, low, high = draw_guidance(jax.random.key(0), 20_000, 8.0)
    assert scale.min() >= 1 and scale.max() <= 8
    np.testing.assert_allclose(
        np.quantile(scale, (0.25, 0.5, 0.75)), 8 ** np.r_[0.25:0.76:0.25], rtol=0.03
    )
    for ends, start in ((low, 0.0), (high, 0.5)):
        assert ends.min() >= start and ends.max() <= start + 0.5
        np.testing.assert_allclose(np.median(ends), start + 0.25, atol=0.01)
    pairs = np.corrcoef([scale, low, high])
    assert np.abs(pairs - np.eye(3)).max() < 0.03


def test_which_objectives_condition_on_guidance():
    assert set(GUIDING) >= {"vcm", "soflow", "meanflow", "split_meanflow", "shortcut"}
    for name in OBJECTIVES:
        plain = make_settings(name, **{"guidance": "fixed"} if name in GUIDING else {})
        assert not plain.guidance_input and plain.draw_guidance(jax.random.key(0), 4) is None
    for name in GUIDING:
        drawn = make_settings(name, guidance="conditioned", guidance_max=5.0).draw_guidance(
            jax.random.key(0), 100
        )
        assert drawn.scale.shape == (100,) and 4 < drawn.scale.max() <= 5


@pytest.mark.parametrize("name", GUIDING)
def test_every_row_has_its_own_guidance(name):
    """Rows with other guidance have the errors of runs whose fixed guidance is theirs."""
    x0, x1, t, s = batch(6, 3, dtype=np.float32)
    scales, (low, high) = (1.5, 4.0), (0.4, 0.7)
    own_interval = name == "soflow"  # whose own one is all times

    def ask(drawn=None, **settings):
        args = (name, linear_net, x0, x1, t, s, 0.3, 3)
        return loss_of(*args, drawn=drawn, **settings)[1]["mse"]

    drawn = Guidance(np.float32(scales * 3), np.full(6, low), np.full(6, high))
    found = ask(drawn, guidance="conditioned")
    inside = (t >= low) & (t <= high)
    assert inside[:3].any() and not inside.all()
    for i, scale in enumerate(scales):
        fixed = {"omega": scale / 2} if name == "meanflow" else {"guidance_scale": scale}
        if not own_interval:
            fixed["guidance_interval"] = (low, high)
        rows = (np.arange(6) % 2 == i) & (inside | (not own_interval))
        np.testing.assert_allclose(found[rows], ask(guidance="fixed", **fixed)[rows], rtol=1e-4)
    unguided = {"omega": 0.5} if name == "meanflow" else {"guidance_scale": 1.0}
    plain = ask(guidance="fixed", **unguided)[:3]
    assert not np.isclose(plain[inside[:3]], found[:3][inside[:3]], rtol=1e-3).any()


@pytest.mark.parametrize("name", GUIDING)
def test_the_cost_of_conditioned_guidance_is_that_of_guidance(name):
    """Where a fixed w = 1 costs nothing, conditioned guidance costs v_uncond."""
    unguided = {"omega": 0.5} if name == "meanflow" else {"guidance_scale": 1.0}
    for num_instant in (0, 3, 8):
        scale = {} if name == "meanflow" else {"guidance_scale": 3.0}
        guided = rows_of_passes(name, num_instant, guidance="fixed", **scale)
        conditioned = rows_of_passes(name, num_instant, guidance="conditioned", **unguided)
        assert conditioned == guided
        if num_instant:
            fixed = rows_of_passes(name, num_instant, guidance="fixed", **unguided)
            assert sum(fixed) < sum(guided)


def test_defaults_must_be_within_what_is_drawn():
    for settings, message in (
        ({"guidance_scale": 9.0}, r"objective.guidance_scale 9 is not in \[1, 8\]"),
        ({"guidance_interval": (0.6, 0.8)}, "objective.guidance_interval 0.6,0.8"),
        ({"guidance_max": 1.0}, "objective.guidance_max must be > 1"),
        ({"guidance": "free"}, "objective.guidance must be one of fixed, conditioned"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            make_settings("vcm", **{"guidance": "conditioned"} | settings)
        assert "\n" not in str(error.value)
    assert dataclasses.replace(make_settings("vcm"), guidance_scale=9.0).guidance_scale == 9.0
    with pytest.raises(
        ValueError, match="flow_matching is guided when it is sampled, not in train"
    ):
        make_settings("flow_matching", guidance="conditioned")

"""The rows of a batch: both kinds, their times, latents, and missing or dropped conditions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from step_batches import STATS, make_batch

from vcm_jax.models import Conditions
from vcm_jax.models.conditioned import fill_conditions
from vcm_jax.training.rows import (
    StepConfig,
    draw_latents,
    draw_rows,
    drop_modalities,
    instant_first,
    instant_places,
)

CONFIG = StepConfig(steps=100)


def test_rows_of_both_kinds_are_spread_evenly():
    """Each device has the same share of s = t rows at the same places, whatever the mesh."""
    places = instant_places(32, 24)
    assert places.sum() == 24
    for devices in (2, 4, 8):
        assert (places.reshape(devices, -1) == places[: 32 // devices]).all()
    assert instant_places(8, 0).sum() == 0 and instant_places(8, 8).all()
    np.testing.assert_array_equal(instant_first(np.arange(8), 6)[6:], [0, 4])


def test_the_times_of_a_row_are_those_of_its_kind():
    key, size = jax.random.key(3), 16
    *_, t, s, lam, _ = draw_rows(STATS, make_batch(size), key, 0, CONFIG)
    np.testing.assert_array_equal(np.asarray(t == s), instant_places(size, 12))
    drawn = CONFIG.objective.draw(jax.random.split(key, 5)[2], size, 12, 0, CONFIG.steps)
    np.testing.assert_array_equal(instant_first(t, 12), drawn[0])
    assert lam == drawn[2]


def test_latents_are_drawn_and_normalised():
    size = 4000
    batch = {
        "latent_mean": np.broadcast_to(STATS["latent_mean"], (size, 1, 4)),
        "latent_std": np.broadcast_to(STATS["latent_std"], (size, 1, 4)),
    }
    x0 = draw_latents(batch, jax.tree.map(jnp.asarray, STATS), jax.random.key(0))
    np.testing.assert_allclose(x0.mean((0, 1)), 0, atol=0.06)
    np.testing.assert_allclose(x0.std((0, 1)), 1, atol=0.04)


def test_missing_and_dropped_modalities_become_the_empty_ones():
    batch = make_batch(64)
    null = Conditions(np.full((1, 4, 6), 7.0), np.full((1, 8, 5), 8.0), np.full((1, 3, 6), 9.0))

    def empty(value, number):
        return np.isclose(value, number).all((1, 2))

    cond = fill_conditions(drop_modalities(batch, jax.random.key(0), CONFIG), null)
    np.testing.assert_array_equal(empty(cond.clip, 7), ~batch["has_video"])
    np.testing.assert_array_equal(empty(cond.sync, 8), ~batch["has_video"])
    np.testing.assert_array_equal(empty(cond.text, 9), ~batch["has_text"])
    dropping = dataclasses.replace(CONFIG, video_drop_prob=0.5)
    cond = fill_conditions(drop_modalities(batch, jax.random.key(0), dropping), null)
    assert empty(cond.clip, 7).sum() > (~batch["has_video"]).sum() + 10
    np.testing.assert_array_equal(empty(cond.clip, 7), empty(cond.sync, 8))
    np.testing.assert_array_equal(empty(cond.text, 9), ~batch["has_text"])

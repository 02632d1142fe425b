"""Transition models: identity, central difference, weights, times, and passes."""

import jax
import numpy as np
from small_batches import (
    FLOW,
    batch,
    check_exact_identity,
    check_guided_identity,
    check_pairs_on_the_flow,
    linear_net,
    loss_of,
    on_the_flow,
    rows_of_passes,
)

from vcm_jax.objectives import make_settings
from vcm_jax.objectives.transition import time_weight

NAME = "transition"
UNGUIDED = dict(guidance_scale=1.0, mix_ratio=1.0)


def test_the_exact_flow_has_no_error():
    check_exact_identity(NAME, derivative="jvp", **UNGUIDED)
    check_guided_identity(NAME, derivative="jvp", along="guided", guidance_interval=(0.0, 1.0))
    check_pairs_on_the_flow(NAME, **UNGUIDED)


def test_with_guidance_the_derivative_along_the_sample_is_another_one():
    x0, x1, t, s = batch(4, dtype=np.float32)
    ask = lambda **along: loss_of(
        NAME, lambda x, *args: x * linear_net(x, *args), x0, x1, t, s, **along
    )[1]["target"]
    assert np.abs(ask(along="sample") - ask(along="guided")).max() > 1e-2
    same = [ask(along=way, **UNGUIDED) for way in ("sample", "guided")]
    np.testing.assert_array_equal(*same)


def test_the_error_of_the_central_difference_shrinks_with_the_square_of_its_step():
    with jax.enable_x64(True):
        x0, x1, t, s = batch()
        x0, x1 = on_the_flow(x0, x1, t)
        errors = [
            np.sqrt(
                loss_of(NAME, FLOW.average, x0, x1, t, s, derivative_step=step, **UNGUIDED)[1][
                    "mse"
                ]
            ).max()
            for step in (0.01, 0.005)
        ]
    np.testing.assert_allclose(errors[0] / errors[1], 4, rtol=0.02)


def test_weights():
    x0, x1, t, s = batch(4, 1, dtype=np.float32)
    loss, aux = loss_of(NAME, linear_net, x0, x1, t, s, None, 1)
    weight = np.r_[1, (np.tan(t[1:]) - np.tan(s[1:]) + 1) ** -0.5]
    np.testing.assert_allclose(loss, (weight * aux["mse"] / (aux["mse"] + 1e-5)).mean(), rtol=1e-5)
    np.testing.assert_allclose(time_weight(t, t), 1, rtol=1e-6)


def test_some_jumps_end_at_the_data():
    t, s, _ = make_settings(NAME).draw(jax.random.key(0), 20_000, 10_000, 0, 1)
    assert (s[:10_000] == t[:10_000]).all() and (s <= t).all()
    np.testing.assert_allclose((s[10_000:] == 0).mean(), 0.2, atol=0.02)


def test_passes():
    assert rows_of_passes(NAME) == [6, 8, 2, 2, 2, 2]
    assert rows_of_passes(NAME, derivative="jvp", **UNGUIDED) == [6, 2, 2]
    assert not make_settings(NAME).needs_jvp

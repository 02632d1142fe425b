"""Targets that another network evaluates, as `target_ema` does with EMA parameters."""

import jax
import numpy as np
import pytest
from small_batches import batch, conditions, linear_net, loss_of, rows_of_passes

from vcm_jax.objectives import OBJECTIVES, make_settings
from vcm_jax.objectives.base import TargetGuidance

AYF = "align_your_flow"
WITH_TARGETS = [name for name, cls in OBJECTIVES.items() if issubclass(cls, TargetGuidance)]


def scaled(factor):
    return lambda *args: factor * linear_net(*args)


def test_vcm_s_target_by_hand():
    x0, x1, t, s = batch(4, 2)
    time = lambda a: a[:, None, None]
    x_t, v = (1 - time(t)) * x0 + time(t) * x1, x1 - x0
    settings = dict(guidance_scale=3.0, mix_ratio=0.25)
    with jax.enable_x64(True):
        _, aux = loss_of(
            "vcm", scaled(1.3), x0, x1, t, s, 0.3, 2, drawn={"target_u": scaled(0.7)}, **settings
        )
    slow, c, null = scaled(0.7), conditions(4), conditions(4, 1.0)
    v_mix = 0.25 * (3 * v - 2 * slow(x_t, t, t, null)) + 0.75 * slow(x_t, t, t, c)
    l = t + 0.3 * (s - t)
    x_l = x_t + time(l - t) * v_mix
    target = np.where(time(t == s), v_mix, 0.3 * v_mix + 0.7 * slow(x_l, l, s, c))
    np.testing.assert_allclose(aux["target"], target, rtol=1e-6)


@pytest.mark.parametrize("name", WITH_TARGETS)
def test_the_target_changes_and_is_not_trained(name):
    """Rows of both kinds; with its own parameters the loss is as without."""
    x0, x1, t, s = batch(4, 2, dtype=np.float32)

    def loss(theta, phi=None):
        options = {} if phi is None else {"target_u": scaled(phi)}
        return loss_of(name, scaled(theta), x0, x1, t, s, 0.2, 2, drawn=options)

    trained, of_target = jax.grad(lambda *args: loss(*args)[0], (0, 1))(1.3, 0.7)
    assert trained != 0 and of_target == 0
    for mine, plain in zip(jax.tree.leaves(loss(1.3, 1.3)), jax.tree.leaves(loss(1.3))):
        np.testing.assert_allclose(mine, plain, rtol=1e-6)
    assert (np.abs(loss(1.3, 0.7)[1]["mse"] / loss(1.3)[1]["mse"] - 1) > 1e-3).any()


@pytest.mark.parametrize(
    "name, kind", [*((n, None) for n in WITH_TARGETS), ("consistency", "ect"), (AYF, "lmd")]
)
def test_the_trained_network_makes_no_target(name, kind):
    """It makes the trained passes and derivatives alone, and TwinFlow's own samples and flows."""
    x0, x1, t, s = batch(4, 1, dtype=np.float32)
    rows, settings = [], {"kind": kind} if kind else {}

    def net(*args):
        rows.append(len(args[0]))
        return linear_net(*args)

    loss_of(name, net, x0, x1, t, s, 0.2, 1, drawn={"target_u": linear_net}, **settings)
    assert sum(rows) == 4 + {"transition": 6, "twinflow": 3}.get(name, 0)


@pytest.mark.parametrize("name", WITH_TARGETS)
def test_passes(name):
    """Predictions that are trained no longer serve as the network's guided velocity."""
    rows_of_passes(name, 3, target_ema=0.9)


def test_what_it_costs_vcm():
    assert rows_of_passes("vcm", target_ema=0.9) == [8, 8, 8, 2]
    assert rows_of_passes("vcm") == [8, 8, 2, 2]
    with pytest.raises(ValueError, match=r"objective.target_ema must be in \[0, 1\), not 1.0"):
        make_settings("vcm", target_ema=1.0)
    with pytest.raises(ValueError, match="flow_matching has no setting target_ema"):
        make_settings("flow_matching", target_ema=0.9)

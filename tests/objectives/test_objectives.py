"""What holds for every objective of the table; each has a test file of its own beside this one."""

import dataclasses
import functools
import re
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flows import GaussianFlow
from small_batches import (
    FLOW,
    batch,
    conditions,
    linear_net,
    loss_of,
    rows_of_passes,
    trained_passes,
)

from vcm_jax.objectives import OBJECTIVES, make_settings, read_section
from vcm_jax.objectives.meanflow import MeanFlowConfig
from vcm_jax.settings import ranges

PAGE = (Path(__file__).parents[2] / "docs" / "objectives.md").read_text()
WITH_JUMPS = [name for name, objective in OBJECTIVES.items() if not objective.instant_only]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_cost_that_an_objective_states_is_what_it_computes(name):
    for num_instant in (0, 3, 6, 8):
        rows_of_passes(name, num_instant)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_gradient_goes_through_one_pass_over_the_batch(name):
    trained, rows = trained_passes(name)
    assert trained and rows == 8


@pytest.mark.parametrize("name", WITH_JUMPS)
def test_null_rows_aim_at_the_plain_velocity(name):
    """They see the empty condition instead of their own, and no guidance."""
    x0, x1, t, s = batch(4, 4, dtype=np.float32)
    x_t = (1 - t)[:, None, None] * x0 + t[:, None, None] * x1
    plain = np.square(linear_net(x_t, t, t, conditions(4, 1.0)) - (x1 - x0)).mean((1, 2))
    is_null = np.array([True, False, True, False])
    _, aux = loss_of(name, linear_net, x0, x1, t, s, 0.2, 4, is_null)
    np.testing.assert_array_equal(np.isclose(aux["mse"], plain, rtol=1e-4), is_null)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_drawn_times_are_what_the_loss_takes(name):
    objective = make_settings(name)
    n = 4000 if objective.instant_only else 1000
    t, s, _ = objective.draw(jax.random.key(0), 4000, n, 50, 100)
    np.testing.assert_array_equal(t[:n], s[:n])
    assert (t <= 1).all() and (s >= 0).all()
    if n < 4000:
        assert (t[n:] - s[n:] >= 0.99e-4).all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_instant_times_are_logit_normal(name):
    objective = make_settings(name)
    t, _, _ = objective.draw(jax.random.key(0), 40_000, 40_000, 50, 100)
    logit = np.log(t / (1 - t))
    np.testing.assert_allclose(np.median(logit), objective.time_mean, atol=0.03)
    np.testing.assert_allclose(np.std(logit), objective.time_std, atol=0.03)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_network_of_half_precision_is_trained_in_float32_under_jit(name):
    n = 4 if OBJECTIVES[name].instant_only else 2
    x0, x1, t, s = batch(4, n, dtype=np.float32)

    def loss(theta):
        def net(*args):
            return (theta * linear_net(*args)).astype(jnp.bfloat16)

        return loss_of(name, net, jnp.asarray(x0, jnp.bfloat16), x1, t, s, 0.2, n)

    (value, aux), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(1.0)
    assert {value.dtype, aux["mse"].dtype} == {jnp.dtype(jnp.float32)}
    assert np.isfinite(gradient) and gradient != 0 and aux["velocity_mse"].shape == (n,)


@pytest.mark.parametrize("name", WITH_JUMPS)
def test_more_instant_rows_than_rows_are_refused(name):
    x0, x1, t, s = batch(4)
    with pytest.raises(ValueError, match="num_instant 5 is not within the batch of 4 rows"):
        loss_of(name, linear_net, x0, x1, t, s, num_instant=5)


def test_how_many_rows_are_instant():
    assert make_settings("vcm", instant_ratio=0.7).num_instant(8) == 6
    assert make_settings("flow_matching").num_instant(8) == 8


# From names to settings.


def test_names_and_settings():
    settings, rest = read_section({"name": "meanflow", "omega": 2.0, "null_prob": 0.3})
    assert settings == MeanFlowConfig(omega=2.0) and rest == {"null_prob": 0.3}
    assert settings.name == "meanflow" and OBJECTIVES["meanflow"] is MeanFlowConfig
    listed = make_settings("vcm", guidance_interval=[0.1, 0.5])
    assert listed.guidance_interval == (0.1, 0.5) and hash(listed)
    with pytest.raises(ValueError, match="'gan' is not one of vcm, flow_matching, soflow"):
        make_settings("gan")
    with pytest.raises(ValueError, match=r"meanflow has no setting lambda_end, .*py:meanflow\)"):
        make_settings("meanflow", lambda_end=0.1, mix_ratio=0.5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_setting_has_a_range_that_refuses_other_types(name):
    fields = dataclasses.fields(OBJECTIVES[name])
    assert ranges(OBJECTIVES[name]).keys() == {field.name for field in fields}
    for field in fields:
        for wrong in (None, object(), float("nan"), [1.0, 2.0, 3.0]):
            with pytest.raises(ValueError, match=f"^objective.{field.name} must be .*, not "):
                make_settings(name, **{field.name: wrong})


# What docs/objectives.md says.


def test_the_example_of_how_to_add_an_objective_works_as_written(monkeypatch):
    section = PAGE.partition("## How to add an objective")[2]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    namespace = {"__name__": "example"}
    exec(textwrap.dedent(code), namespace)
    monkeypatch.setitem(OBJECTIVES, "cauchy", namespace["CauchyConfig"])
    assert rows_of_passes("cauchy") == [8] and trained_passes("cauchy") == ([0], 8)
    x0, x1, t, _ = batch(4)
    loss, aux = loss_of("cauchy", linear_net, x0, x1, t, t, None, num_instant=4, scale=2.0)
    np.testing.assert_allclose(loss, np.log1p(aux["mse"] / 2).mean(), rtol=1e-6)
    with pytest.raises(ValueError, match="objective.scale must be > 0, not 0"):
        make_settings("cauchy", scale=0)


def test_the_page_knows_every_objective_its_cost_and_its_settings():
    section = PAGE.partition("## Their cost")[2].partition("## ")[0]
    costs = re.findall(r"^\| `(\w+)` \|[^|]*\|[^|]*\| ([\d.]+)", section, re.MULTILINE)
    stated = {name: float(passes) for name, passes in costs}
    assert stated == {name: make_settings(name).passes().forward for name in OBJECTIVES}
    for name, objective in OBJECTIVES.items():
        for setting in ranges(objective):
            assert f"`{setting}`" in PAGE, (name, setting)


def test_the_flow_of_these_tests_is_the_flow_of_the_other_tests():
    """The traceable flow agrees with the plain one, also across its removable singularity."""
    plain = GaussianFlow(0.7, 0.4)
    x, _, t, s = batch()
    s[0] = t[0]
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-9)
    with jax.enable_x64(True):
        close(
            FLOW.average(x, t, s, None),
            plain.average_velocity(x, t[:, None, None], s[:, None, None]),
        )


@pytest.mark.parametrize(
    "name, settings",
    [
        ("shortcut", {}),
        ("split_meanflow", {}),
        ("lagrangian", {}),
        ("align_your_flow", {"kind": "lmd"}),
    ],
)
def test_jumps_that_learn_from_the_network_alone_need_rows_of_data(name, settings):
    with pytest.raises(ValueError, match=r"instant_ratio must be (in \(0, 1\]|above 0)"):
        make_settings(name, instant_ratio=0.0, **settings)

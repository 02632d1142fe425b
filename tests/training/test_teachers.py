"""Objectives that take the velocity of a trained run."""

import dataclasses

import jax
import numpy as np
import pytest
from small_runs import SIZES, final_state, make_config

from vcm_jax.models import MODELS, MMDiT
from vcm_jax.models.conditioned import zero_inputs
from vcm_jax.objectives import make_settings
from vcm_jax.records.source import RecordSource
from vcm_jax.training import loop
from vcm_jax.training.loss import Teacher, loss_fn
from vcm_jax.training.rows import StepConfig

LENGTHS = dict(latent_seq_len=6, clip_seq_len=2, sync_seq_len=8, text_seq_len=2, latent_dim=3)
MODEL = dataclasses.replace(MODELS["demo"], **SIZES, **LENGTHS)
STATS = {
    "latent_mean": np.zeros(3, np.float32),
    "latent_std": np.ones(3, np.float32),
    "empty_text": np.full((2, 4), 0.5, np.float32),
}


def random_like(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: 0.2 * rng.standard_normal(a.shape, np.float32), tree)


def batch(size=4):
    rng = np.random.default_rng(0)
    shapes = {"latent_mean": (6, 3), "latent_std": (6, 3), "clip": (2, 6), "sync": (8, 5)}
    arrays = {
        name: rng.standard_normal((size, *shape), np.float32)
        for name, shape in (shapes | {"text": (2, 4)}).items()
    }
    return arrays | {
        name: np.array([True, False, True, True]) for name in ("has_video", "has_text")
    }


def test_a_student_with_its_teacher_s_weights_has_its_velocity():
    """At s = t, with and without a condition, also if the teacher's conditions are its own."""
    net = MMDiT(MODEL)
    abstract = jax.eval_shape(net.init, jax.random.key(0), *zero_inputs(MODEL))["params"]
    objective = make_settings(
        "align_your_flow", teacher="run", guidance_scale=1.0, instant_ratio=1.0
    )
    config = StepConfig(steps=10, objective=objective, null_prob=0.5)
    teacher = Teacher(net, make_settings("flow_matching"), 0)

    @jax.jit
    def mse(params, of_teacher):
        variables = {"params": of_teacher, "stats": STATS}
        args = (params, STATS, batch(), jax.random.key(1), 0, variables)
        return loss_fn(*args, net=net, config=config, teacher=teacher)[1]["mse"].compute()

    params, others = random_like(abstract, 1), random_like(abstract, 2)
    assert mse(params, params) < 1e-9 < 1e-4 < mse(params, others)


def test_two_legs_take_a_guided_teacher():
    """On shapes alone: its conditions come in pairs, and it may have guidance as an input."""
    config = StepConfig(
        steps=10, objective=make_settings("reflow", teacher="run", two_leg=1.0, teacher_steps=2)
    )
    net = MMDiT(MODEL)
    for name, settings in (("flow_matching", {}), ("vcm", {"guidance": "conditioned"})):
        objective = make_settings(name, **settings)
        theirs = net.clone(
            config=dataclasses.replace(MODEL, guidance_input=objective.guidance_input)
        )
        variables, params = (
            jax.eval_shape(n.init, jax.random.key(0), *zero_inputs(n.config)) for n in (theirs, net)
        )
        variables, params = {"params": variables["params"], "stats": STATS}, params["params"]

        def loss(params, variables, objective=objective, theirs=theirs):
            teacher = Teacher(theirs, objective, 2)
            args = (params, STATS, batch(), jax.random.key(1), 0, variables)
            return loss_fn(*args, net=net, config=config, teacher=teacher)[0]

        assert jax.eval_shape(jax.grad(loss), params, variables).keys() == params.keys()


@pytest.mark.slow
def test_runs_take_the_statistics_of_their_teacher(data, tmp_path):
    def config(objective, **changes):
        changes = dict(steps=2, eval_every=0, checkpoint_every=2) | changes
        return make_config(data, objective, **changes)

    teacher, other = str(tmp_path / "teacher"), str(tmp_path / "other")
    loop.train(config("flow_matching"), teacher)
    own = RecordSource(data / "val").manifest.latent_mean  # of the students' data
    for name, settings in (
        ("align_your_flow", {"eval_every": 2}),
        ("reflow", {"objective.two_leg": 1.0, "objective.teacher_steps": 2}),
    ):
        workdir = tmp_path / name
        changes = {"objective.teacher": teacher, "data.sources": ("val=1",)} | settings
        loop.train(config(name, **changes), workdir)
        stats = [final_state(place)["stats"]["latent_mean"] for place in (workdir, teacher)]
        np.testing.assert_array_equal(*stats)
        assert np.abs(stats[0] - np.float32(own)).max() > 0.01
    loop.train(config("vcm", **{"objective.guidance_scale": 2.0}), other)
    with pytest.raises(loop.SetupError, match="has guidance in its weights: it takes .*scale=1"):
        loop.train(config("align_your_flow", **{"objective.teacher": other}), tmp_path / "refused")
    start = {"objective.teacher": teacher, "init_from": str(tmp_path / "on_val")}
    loop.train(config("flow_matching", **{"data.sources": ("val=1",)}), tmp_path / "on_val")
    with pytest.raises(loop.SetupError, match="normalise latents differently: start from the"):
        loop.train(config("align_your_flow", **start), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()

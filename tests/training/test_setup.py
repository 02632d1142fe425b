"""Runs that cannot start, and what configs and objectives make of a run."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from small_runs import (
    CONFIGS,
    SIZES,
    final_state,
    load_config,
    make_config,
    write_records,
)

from vcm_jax.devices import sharding
from vcm_jax.features.encoders import WeightsFreeEncoders
from vcm_jax.generation.run import load_run
from vcm_jax.interop import import_network
from vcm_jax.models import MODELS, MMDiT, ModelConfig, layers
from vcm_jax.models.conditioned import zero_inputs
from vcm_jax.objectives import OBJECTIVES, make_settings, read_section
from vcm_jax.records import mixture
from vcm_jax.records.source import RecordSource
from vcm_jax.sampling import Sampler
from vcm_jax.training import loop, resume, setup
from vcm_jax.training.loss import teacher_data
from vcm_jax.training.state import OptimizerConfig, make_init, make_optimizer
from vcm_jax.training.step import train_step
from vcm_jax.training.teacher import load_teacher


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batch_size": 6}, "batch_size 6 does not divide"),
        ({"mesh.data": 3}, "does not fit 8 devices"),
        (
            {"model_overrides.hidden_dim": 20, "mesh.data": 1, "mesh.fsdp": 8, "mesh.tensor": 1},
            "mesh.fsdp=8 does not divide the model's hidden_dim 20",
        ),
        ({"checkpoint_every": 0}, "config.checkpoint_every must be an integer in .1, .*, not 0"),
        ({"eval_batches": 0}, "config.eval_batches must be an integer in .1, .*, not 0"),
        ({"data.sources": ()}, "data.sources is empty"),
        ({"data.sources": ("train=-1",)}, "PATH=WEIGHT"),
        ({"data.sources": ("nowhere=1",)}, "nowhere"),
        ({"model": "tiny"}, "config.model must be one of small_16k, .*, not 'tiny'"),
        ({"objective.name": "gan"}, "'gan' is not one of vcm, flow_matching, soflow, meanflow"),
        ({"objective.name": "meanflow"}, "meanflow has no setting guidance_scale, lambda_end"),
        ({"objective.mix_ratio": 2.0}, "mix_ratio"),
        ({"optimizer.b1": 1.0}, "optimizer.b1"),
        ({"steps": 0}, "steps"),
        ({"batch_size": 0}, "config.batch_size must be an integer"),
        ({"accumulate": 3}, "batch_size 8 does not divide into accumulate = 3 microbatches"),
        ({"accumulate": 0}, "config.accumulate must be an integer"),
        ({"attention": "cudnn"}, "config.attention=cudnn needs NVIDIA GPUs on this machine"),
        ({"topology": "v5e:4x4"}, "config.topology=v5e:4x4 describes devices that are not there"),
        (
            {"batch_size": 16, "accumulate": 4, "objective.instant_ratio": 0.6},
            "accumulate 4 does not divide the 10 rows",
        ),
        ({"remat": "some"}, "config.remat must be one of none, products, full, not 'some'"),
        ({"on_nonfinite": "hope"}, "config.on_nonfinite must be one of stop, skip, not 'hope'"),
        ({"profile": "5"}, "profile '5' must be START:STOP"),
        ({"dtype": "float99"}, "config.dtype must be one of float32, bfloat16, not 'float99'"),
        ({"init_from": "nowhere"}, "nowhere: no checkpoints"),
        ({"data.val_sources": ("nowhere=1",)}, "nowhere"),
        (
            {"data.sources": ("train=1e308",)},
            "train=1e308' must be 'PATH=WEIGHT' with a weight betw",
        ),
        ({"eval_sample_steps": (0,)}, r"config.eval_sample_steps must be .*, not \(0,\)"),
        ({"ema_sigma_rels": (0.05, 5.0)}, r"config.ema_sigma_rels must be .*, not \(0.05, 5.0\)"),
        ({"seed": -1}, "config.seed must be an integer .*, not -1"),
        ({"optimizer.decay_steps": (-5, 3)}, r"optimizer.decay_steps must be .*, not \(-5, 3\)"),
    ],
)
def test_runs_that_cannot_start(data, tmp_path, changes, message):
    with pytest.raises(loop.SetupError, match=message) as error:
        loop.train(make_config(data, **changes), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists(), "nothing is written before the settings are checked"


def test_records_of_other_sizes(data, tmp_path):
    config = make_config(data)
    config.model_overrides.sync_dim = 7
    with pytest.raises(loop.SetupError, match="records have sync_dim 5, model demo has 7"):
        loop.train(config, tmp_path / "run")
    config.model_overrides.clip_dim = 8
    with pytest.raises(loop.SetupError) as error:
        loop.train(config, tmp_path / "run")
    assert str(error.value) == (
        "the records have clip_dim 6, sync_dim 5, model demo has 8, 7: train with "
        "--config.model_overrides.clip_dim=6 --config.model_overrides.sync_dim=5, or extract with "
        "--clip_dim=8 --sync_dim=7"
    )
    config.model_overrides.latent_dim = 40
    with pytest.raises(loop.SetupError, match=r"latent_dim 20, .*sync_dim=5$"):
        loop.train(config, tmp_path / "run")
    config.model_overrides.sync_dims = 5
    with pytest.raises(loop.SetupError, match="unknown keys .'sync_dims'."):
        loop.train(config, tmp_path / "run")
    write_records(tmp_path / "other", 3, encoders=WeightsFreeEncoders(6, 9, 4))
    config = make_config(data, **{"data.sources": ("train=1", f"{tmp_path}/other=1")})
    with pytest.raises(loop.SetupError, match="differ in their encoders"):
        loop.train(config, tmp_path / "run")


def test_the_network_for_a_laptop_takes_its_sizes_from_the_records(data):
    """configs/small.py on records of any width, and its number of parameters."""
    config = load_config("small")
    config.data.sources = (f"{data}/train=1",)
    model = setup.read_setup(config, without_data=False).model
    assert (model.latent_dim, model.clip_dim, model.sync_dim, model.text_dim) == (20, 6, 5, 4)
    assert (model.latent_seq_len, model.clip_seq_len, model.text_seq_len) == (20, 5, 5)
    for widths in (model, MODELS["laptop"]):
        stats = {"latent_mean": np.zeros(20), "latent_std": np.ones(20)}
        stats["empty_text"] = np.zeros((widths.text_seq_len, widths.text_dim))
        init = make_init(MMDiT(widths), stats, make_optimizer(OptimizerConfig()), (0.05,))
        params = jax.eval_shape(init, jax.random.key(0)).params
        assert 8e6 < sum(leaf.size for leaf in jax.tree.leaves(params)) < 15e6
    config.model_overrides.sync_dim = 7
    with pytest.raises(loop.SetupError, match="records have sync_dim 5, model laptop has 7"):
        setup.read_setup(config, without_data=False)


def test_a_path_that_exists_is_taken_as_it_is(data, tmp_path, monkeypatch):
    """A config's data.dir comes first for names that are in it alone."""
    monkeypatch.chdir(data)

    def open_(path, directory):
        ((source,), _) = setup.open_sources((path,), directory, "sources")
        return Path(source.path)

    (tmp_path / "base").mkdir()
    assert open_("train=1", str(tmp_path / "base")).samefile(data / "train")
    assert open_("train=1", "").samefile(data / "train")
    assert open_("train=1", ".").samefile(data / "train")
    assert open_("train=1", str(data)).samefile(data / "train")
    assert open_(f"{data}/val=1", str(tmp_path / "base")).samefile(data / "val")
    write_records(tmp_path / "base/train", 3)
    with pytest.raises(loop.SetupError, match="train: two folders of records, .*whole path"):
        open_("train=1", str(tmp_path / "base"))
    (data / "train2").mkdir()  # an extraction that has not ended
    write_records(tmp_path / "base/train2", 3)
    assert open_("train2=1", str(tmp_path / "base")).samefile(tmp_path / "base/train2")
    with pytest.raises(loop.SetupError, match="gone: no such folder, neither as it is nor in data"):
        open_("gone=1", str(tmp_path / "base"))


def test_an_inherited_validation_set_is_named(data):
    config = load_config("impacts")
    config.data.update({"dir": "", "sources": (f"{data}/train=1",)})
    with pytest.raises(loop.SetupError) as error:
        setup.read_setup(config, without_data=False)
    line = str(error.value)
    assert line.startswith("config.data.val_sources='val=1': ")
    assert line.endswith('; --config.data.val_sources="()" trains without validation')
    config.data.val_sources = ()
    config.update_from_flattened_dict(
        {f"model_overrides.{name}": size for name, size in SIZES.items()}
    )
    assert setup.read_setup(config, without_data=False).val is None


def test_statistics_of_a_mixture(data, tmp_path):
    class Fake:
        def __init__(self, mean, std):
            self.manifest = type("M", (), {"latent_mean": mean, "latent_std": std})

    found = setup.mixed_statistics([Fake([0.0], [1.0]), Fake([4.0], [2.0])], [3, 1])
    np.testing.assert_allclose(found["latent_mean"], [1.0])
    # E[x^2] = 3/4 * 1 + 1/4 * (16 + 4) = 5.75, minus the squared mean.
    np.testing.assert_allclose(found["latent_std"], [4.75**0.5])


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_every_config_builds_its_settings(path):
    config = load_config(path.stem)
    assert setup.step_config(config).steps == config.steps


def tiny(data, objective, **changes):
    return make_config(data, objective, steps=2, eval_every=0, checkpoint_every=2, **changes)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in ("vcm", "reflow")])
def test_every_objective_builds_its_run(name):
    """Its configs, and its step on abstract values: compiling every step would take minutes."""
    for config in ("s16k", "impacts"):
        settings = setup.step_config(load_config(config, name))
        assert settings.objective.name == name
    guided = settings.objective.guidance_input
    model = dataclasses.replace(MODELS["demo"], **SIZES, guidance_input=guided)
    net, optimizer = MMDiT(model), make_optimizer(OptimizerConfig())
    stats = {
        "latent_mean": np.zeros(20),
        "latent_std": np.ones(20),
        "empty_text": np.zeros((77, 4)),
    }
    state = jax.eval_shape(make_init(net, stats, optimizer, (0.05,)), jax.random.key(0))
    shapes = {
        "latent_mean": (80, 20),
        "latent_std": (80, 20),
        "clip": (20, 6),
        "sync": (56, 5),
        "text": (77, 4),
        "has_video": (),
        "has_text": (),
    }
    batch = {
        key: jax.ShapeDtypeStruct((32, *shape), bool if key.startswith("has") else np.float32)
        for key, shape in shapes.items()
    }
    step = functools.partial(train_step, net=net, optimizer=optimizer, config=settings)
    after, metrics = jax.eval_shape(step, state, batch, jax.random.key(1))
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert metrics.loss.total.dtype == np.float32
    parts = functools.partial(step, accumulate=2)
    assert jax.eval_shape(parts, state, batch, jax.random.key(1))[0] == after


def test_reflow_learns_from_a_trained_run(data, tmp_path):
    teacher = tmp_path / "teacher"
    loop.train(tiny(data, "flow_matching"), teacher)
    student = tiny(data, "reflow", **{"objective.teacher": str(teacher)})
    student.objective.teacher_steps = 2
    loop.train(student, tmp_path / "student")
    assert final_state(tmp_path / "student")["step"] == 2
    run = json.loads((teacher / "run.json").read_text())

    # The student trains on the teacher's samples, in the student's normalisation.
    net = MMDiT(ModelConfig(**run["model"]))
    loaded, variables = load_teacher(
        read_section(student.objective)[0], net, RecordSource(data / "train").manifest
    )
    (source,), weights = setup.open_sources(("train=1",), str(data), "sources")
    shapes = mixture.Shapes(clip=(5, 6), sync=(8, 5))
    mixed = mixture.mix([source], weights, seed=0)
    (batch,) = mixture.batches(mixed, shapes, batch_size=2, first_step=0, last_step=1)
    x1 = np.random.default_rng(0).standard_normal((2, net.config.latent_seq_len, 20), np.float32)
    stats = dict(variables["stats"])
    args = (batch, x1, np.zeros(2, bool))
    same = teacher_data(loaded, variables, stats, *args)
    twice = stats | {"latent_std": 2 * stats["latent_std"]}
    halved = teacher_data(loaded, variables, twice, *args)
    np.testing.assert_allclose(halved, same / 2, atol=1e-5)
    assert same.shape == x1.shape and np.abs(same - x1).max() > 1e-3
    half = teacher_data(loaded, variables, stats, batch, x1, np.array([True, False]))
    np.testing.assert_allclose(half[1], same[1], atol=1e-6)
    assert (half[0] != same[0]).any(), "a row without its condition is another sound"

    for changes, message in (
        ({}, "objective.teacher is empty: name the workdir"),
        ({"objective.teacher": str(tmp_path)}, "has no run.json"),
        (
            {"objective.teacher": str(teacher), "model_overrides.hidden_dim": 32},
            "teacher is of another size: hidden_dim 16, not 32",
        ),
    ):
        with pytest.raises(loop.SetupError, match=message) as error:
            loop.train(tiny(data, "reflow", **changes), tmp_path / "refused")
        assert "\n" not in str(error.value) and not (tmp_path / "refused").exists()


def test_conditioned_guidance_from_weights_without_its_input_to_a_run_that_takes_it(data, tmp_path):
    start, workdir = tmp_path / "start", tmp_path / "run"
    config = tiny(data, "vcm", **{"objective.guidance": "conditioned", "init_from": str(start)})
    (source,), _ = setup.open_sources(("train=1",), str(data), "sources")
    model = setup.model_config(config, source.manifest)
    assert model.guidance_input
    plain = MMDiT(dataclasses.replace(model, guidance_input=False))
    given = plain.init(jax.random.key(3), *zero_inputs(plain.config))
    import_network.save(start, given, {})
    init = make_init(MMDiT(model), {}, make_optimizer(OptimizerConfig()), (0.05,))
    filled = jax.jit(init)(jax.random.key(0), given["params"]).params
    assert not filled["g_embed"]["mlp_2"]["kernel"].any()
    assert filled["g_embed"]["mlp_0"]["kernel"].std() > 0.01
    assert filled.keys() - given["params"].keys() == {"g_embed"}

    loop.train(config, workdir)
    run = load_run(workdir, with_encoders=False)
    assert run.model == model and run.objective.guidance_input
    dataclasses.replace(run, sampler=Sampler(guidance_scale=8.0))
    with pytest.raises(ValueError, match=r"guidance_scale 9 is not in \[1, 8\]"):
        dataclasses.replace(run, sampler=Sampler(guidance_scale=9.0))
    student = MMDiT(plain.config)
    settings = make_settings("reflow", teacher=str(workdir))
    teacher, _ = load_teacher(settings, student, source.manifest)
    assert teacher.net.config == model, "a teacher keeps its input for guidance"

    for changes, message in (
        ({"objective.guidance": "some"}, "objective.guidance must be one of fixed, conditioned"),
        ({"objective.guidance_scale": 9.0, "objective.guidance": "conditioned"}, "scale 9 is not"),
        ({"init_from": str(workdir)}, "g_embed/.* wanted none"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            loop.train(tiny(data, "vcm", **changes), tmp_path / "refused")
        assert "\n" not in str(error.value)
    fixed = tiny(data, "vcm")
    fixed.model_overrides.guidance_input = True
    with pytest.raises(loop.SetupError, match="guidance_input is for objectives with"):
        setup.model_config(fixed, source.manifest)
    unguided = tiny(data, "flow_matching")
    unguided.objective.guidance = "conditioned"
    with pytest.raises(loop.SetupError, match="flow_matching is guided when it is sampled, not in"):
        loop.train(unguided, tmp_path / "refused")


def test_meanflow_needs_attention_with_a_jvp(data, tmp_path, monkeypatch):
    """Fused kernels have a hand-written backward pass, like this attention."""
    plain = layers.attention
    fused = jax.custom_vjp(lambda *qkv: plain(*qkv))
    fused.defvjp(lambda *qkv: (plain(*qkv), qkv), lambda qkv, g: jax.vjp(plain, *qkv)[1](g))
    monkeypatch.setattr(layers, "attention", lambda q, k, v, implementation: fused(q, k, v))
    with pytest.raises(loop.SetupError, match="meanflow takes a JVP, which this attention"):
        loop.train(tiny(data, "meanflow"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_ablations_change_one_setting():
    ablated = load_config("ablations", "w=2,lambda_end=1/250")
    before, now = load_config("s16k").to_dict(), ablated.to_dict()
    assert resume.changes(before, now) == {
        "objective.guidance_scale": "is 2.0, was 4.0",
        "objective.lambda_end": "is 0.004, was 0.002",
    }
    assert load_config("ablations", "base=impacts,r=0").batch_size == 16
    assert load_config("ablations", "sync=time").model_overrides.sync_alignment == "time"
    for text, message in (
        ("q=1", "ablation 'q' is not one of w, m, r, p, lambda_end"),
        ("w=much", "ablation w=much is not a number"),
        ("base=x,w=1", "base 'x' is not one of s16k, impacts"),
    ):
        with pytest.raises(ValueError, match=message):
            load_config("ablations", text)


def test_the_rows_of_a_microbatch_suit_the_objective():
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    step = setup.StepConfig(steps=5, objective=make_settings("imm"))
    setup.check_batch(step, 16, mesh, 1)
    with pytest.raises(ValueError, match="groups of objective.group = 4 rows: the 6 rows"):
        setup.check_batch(step, 16, mesh, 2)

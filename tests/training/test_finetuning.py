"""Runs that start from other weights and train some of their parameters, or an adapter."""

import json
import shutil

import jax
import numpy as np
import pytest
from flax import traverse_util
from small_runs import final_state, load_config, make_config

from vcm_jax import weights
from vcm_jax.generation.run import load_run
from vcm_jax.runs import averages
from vcm_jax.training import loop
from vcm_jax.training.dry_run import describe
from vcm_jax.training.program import make_program
from vcm_jax.training.setup import read_setup
from vcm_jax.training.teacher import load_teacher

ROWS = {"mesh.data": 8, "mesh.fsdp": 1, "mesh.tensor": 1}  # the mesh that compiles soonest
ADAPTER = {"adapter.rank": 2, "adapter.scale": 2.0, "optimizer.train_only": ("h_embed",)}


def config(data, **changes):
    """A run of flow matching, which has no schedule that depends on the number of steps."""
    defaults = {"eval_every": 0, "checkpoint_every": 2, "steps": 4, "optimizer.warmup_steps": 0}
    return make_config(data, "flow_matching", **ROWS | defaults | changes)


@pytest.fixture(scope="module")
def base(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "run"
    loop.train(config(data, steps=2, **{"optimizer.learning_rate": 0.02}), folder)
    return folder


@pytest.fixture(scope="module")
def adapted(data, base, tmp_path_factory):
    """The workdir of a run that trained an adapter on `base` without interruption."""
    folder = tmp_path_factory.mktemp("adapted") / "run"
    loop.train(config(data, init_from=str(base), eval_every=4, **ADAPTER), folder)
    return folder


def test_checkpoints_hold_what_is_trained(base, adapted):
    state, whole = final_state(adapted), final_state(base)
    trained = traverse_util.flatten_dict(state["params"], sep="/")
    assert set(state) == {"step", "params", "stats", "opt_state", "ema"}
    assert "fused_blocks_0/attn/qkv/lora_a" in trained and "h_embed/mlp_0/bias" in trained
    assert not any(name.endswith("kernel") for name in trained if "h_embed" not in name)
    size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    assert size(state["params"]) < 0.35 * size(whole["params"])
    assert size(state["opt_state"]) < 2.1 * size(state["params"])
    # All of it has moved: B was zero.
    moved = [np.abs(value).max() for name, value in trained.items() if name.endswith("lora_b")]
    assert len(moved) > 20 and np.mean(np.array(moved) > 0) > 0.9


def test_a_resumed_adapter_ends_bit_identical(data, base, adapted, tmp_path):
    options = ADAPTER | {"init_from": str(base)}
    loop.train(config(data, steps=2, **options), tmp_path / "run")
    loop.train(config(data, **options), tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, final_state(tmp_path / "run"), final_state(adapted))
    # A base that has moved is found where it is linked.
    shutil.copytree(base, tmp_path / "moved")
    described = json.loads((adapted / "run.json").read_text())
    assert described["base"]["place"] == str(base) and len(described["base"]["hash"]) == 16
    (tmp_path / "run" / "base").symlink_to(tmp_path / "moved")
    found = weights.read_run(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, found, weights.read_run(adapted))


def test_generation_merges_the_adapter(base, adapted):
    trained, whole = averages.restore_weights(adapted), averages.restore_weights(base)
    run = load_run(adapted, with_encoders=False)
    flat = {
        name: traverse_util.flatten_dict(tree["params"], sep="/")
        for name, tree in dict(trained=trained, base=whole, run=run.variables).items()
    }
    layer = "fused_blocks_0/linear1/"
    a, b = (flat["trained"][f"{layer}lora_{which}"] for which in "ab")
    wanted = flat["base"][f"{layer}kernel"] + 2.0 * a @ b
    np.testing.assert_allclose(flat["run"][f"{layer}kernel"], wanted, atol=1e-6)
    assert np.abs(wanted - flat["base"][f"{layer}kernel"]).max() > 1e-3
    np.testing.assert_array_equal(
        flat["run"]["h_embed/mlp_0/bias"], flat["trained"]["h_embed/mlp_0/bias"]
    )
    assert set(flat["run"]) == set(flat["base"])
    # best/ is a workdir of its own, and a run can be the start or the teacher of another one.
    found = weights.read_run(adapted / "best")["params"]
    jax.tree.map(np.testing.assert_array_equal, found, run.variables["params"])
    found = weights.read(str(adapted))["params"]
    jax.tree.map(np.testing.assert_array_equal, found, run.variables["params"])


@pytest.mark.slow
def test_frozen_parameters_on_another_mesh(data, base, tmp_path):
    """The parameters of one block are trained, and no others; meshes differ by rounding."""
    found = {}
    for name, mesh in {"split": dict.fromkeys(ROWS, 2), "rows": ROWS}.items():
        options = {"init_from": str(base), "optimizer.freeze": ("[!f]*", "final_layer"), **mesh}
        loop.train(config(data, steps=1, **options), tmp_path / name)
        found[name] = final_state(tmp_path / name)
    assert set(found["split"]["params"]) == {"fused_blocks_0"}
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)
    jax.tree.map(close, found["split"]["ema"], found["rows"]["ema"])
    before, after = averages.restore_weights(base), weights.read_run(tmp_path / "split")
    same = jax.tree.map(np.array_equal, before["params"], after["params"])
    assert not all(jax.tree.leaves(same.pop("fused_blocks_0")))
    assert all(jax.tree.leaves(same))


def test_what_does_not_fit_is_one_line(data, base, adapted, tmp_path):
    def refused(workdir=tmp_path / "new", **changes):
        with pytest.raises(loop.SetupError) as error:
            loop.train(config(data, **{"init_from": str(base), **ADAPTER, **changes}), workdir)
        assert "\n" not in str(error.value)
        return str(error.value)

    # A complete run is compared with its settings too.
    assert "another run: config.adapter.rank is 4, was 2" in refused(adapted, **{"adapter.rank": 4})
    other = tmp_path / "other"
    shutil.copytree(base, other)
    shutil.rmtree(other / "checkpoints/2")
    loop.train(config(data, steps=2, seed=1, **{"optimizer.learning_rate": 0.02}), other)
    line = refused(adapted, init_from=str(other))
    assert f"on top of {base}" in line and f"config.init_from is {other}" in line
    line = refused(**{"optimizer.freeze": ("t_embd",)})
    assert "optimizer.freeze: 't_embd' matches no parameter; the nearest are t_embed" in line
    assert "what config.optimizer.train_only" in refused(init_from="")
    line = refused(**{"model_overrides.hidden_dim": 32, "model_overrides.depth": 3})
    assert f"init_from {base} is of another size: hidden_dim 16, not 32; depth 2, not 3" in (
        line.replace("latent_dim", "").replace(", hidden", "; hidden").replace(", depth", "; depth")
    )
    assert refused(**{"adapter.rank": -1}) == "adapter.rank must be an integer >= 0, not -1"
    vcm = make_config(data, init_from=str(base), **{"objective.guidance": "conditioned", **ADAPTER})
    with pytest.raises(loop.SetupError, match="no input for guidance, .*'g_embed',"):
        loop.train(vcm, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    # The base of an adapter was trained further.
    described = json.loads((adapted / "run.json").read_text())
    broken = tmp_path / "broken"
    shutil.copytree(adapted, broken)
    described["base"]["place"] = str(other)
    described.pop("hash")
    (broken / "run.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match="trained on top of .*other, but the weights there are"):
        weights.read_run(broken)
    shutil.rmtree(other)
    with pytest.raises(ValueError, match="which cannot be read .*: link it as .*broken/base"):
        weights.read_run(broken)


def test_the_settings_for_fine_tuning(data, base):
    """configs/finetune.py takes the sizes from the weights that it starts from."""
    found = load_config("finetune", "vcm")
    found.data.sources = (f"{data}/train=1",)
    with pytest.raises(loop.SetupError, match="--config.init_from=NAME or DIR"):
        read_setup(found, without_data=False)
    found.init_from = str(base)
    setup = read_setup(found, without_data=False)
    assert setup.model.hidden_dim == 16 and setup.model.latent_seq_len == 20
    assert setup.selection.is_whole
    found.model_overrides.blocks_at_s = 1
    found.adapter.rank = 2
    setup = read_setup(found, without_data=False)
    assert setup.model.blocks_at_s == 1 and len(setup.selection.adapted) > 20
    found.init_from = "mmaudio_large_44k_v2"
    with pytest.raises(
        loop.SetupError,
        match="the records have latent_dim 20, .*mmaudio_large_44k_v2 has 40.*extract",
    ):
        read_setup(found, without_data=False)
    # A teacher need not have blocks that see s.
    found = load_config("finetune", "reflow")
    found.objective.teacher = str(base)
    teacher, _ = load_teacher(read_objective(found), setup.net, setup.sources[0].manifest)
    assert teacher.net.config.blocks_at_s == 0


def read_objective(config):
    from vcm_jax.objectives import read_section

    return read_section(config.objective)[0]


@pytest.mark.slow
def test_the_dry_run_shows_what_is_frozen(data, base):
    found = config(data, init_from=str(base), **ADAPTER)
    lines, _ = describe(make_program(found, read_setup(found, without_data=False)))
    assert "frozen 0.000 GiB" in lines and "lora_a" in lines

"""Which parameters a run trains, how its optimizer holds them, and jumps that grow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vcm_jax.models.adapter import AdapterConfig
from vcm_jax.objectives import make_settings
from vcm_jax.objectives.flow_matching import FlowMatchingConfig
from vcm_jax.objectives.shortcut import ShortcutConfig
from vcm_jax.training.rows import StepConfig, anneal
from vcm_jax.training.selection import ALL, Selection, matching, select
from vcm_jax.training.state import OptimizerConfig, make_optimizer

NAMES = ["h_embed/mlp_0/kernel", "h_embed/mlp_0/bias", "fused_blocks_0/attn/qkv/kernel"]


class Net:
    """A network of three parameters; the second dtype is of its computation."""

    config, dtype = None, jnp.bfloat16

    @staticmethod
    def init(key, *_):
        tree = {}
        for name in NAMES:
            *modules, leaf = name.split("/")
            branch = tree
            for module in modules:
                branch = branch.setdefault(module, {})
            branch[leaf] = jnp.ones((2,) * (1 if leaf == "bias" else 4 if "qkv" in name else 2))
        return {"params": tree}


@pytest.fixture(autouse=True)
def no_inputs(monkeypatch):
    monkeypatch.setattr("vcm_jax.training.selection.zero_inputs", lambda config: ())


@pytest.mark.parametrize(
    "pattern, count",
    [("h_embed", 2), ("*kernel", 2), ("*_blocks_*", 1), ("*/attn", 1), ("h_embed/mlp_[01]/b*", 1)],
)
def test_patterns_match_parameters_and_modules(pattern, count):
    assert len(matching(NAMES, [pattern], "freeze")) == count


@pytest.mark.parametrize(
    "pattern, nearest",
    [("h_embd", "h_embed"), ("H_embed", "h_embed"), ("fused_blocks_9/attn", "fused_blocks_0/attn")],
)
def test_a_pattern_that_matches_nothing_names_the_nearest(pattern, nearest):
    with pytest.raises(ValueError, match=f"freeze: '{pattern}' matches no.* are {nearest}"):
        matching(NAMES, ["h_embed", pattern], "freeze")


def test_what_is_trained():
    def names(paths):
        return {"/".join(path) for path in paths}

    none = AdapterConfig()
    assert select(Net, (), (), none) is ALL
    assert names(select(Net, ("h_embed",), (), none).trained) == set(NAMES[:2])
    assert names(select(Net, (), ("h_embed",), none).trained) == {NAMES[2]}
    assert names(select(Net, ("h_embed",), ("*/bias",), none).trained) == {NAMES[0]}
    found = select(Net, (), (), AdapterConfig(rank=1))
    assert not found.trained and names(found.adapted) == {NAMES[0], NAMES[2]}
    found = select(Net, ("h_embed",), (), AdapterConfig(rank=1))
    assert names(found.trained) == set(NAMES[:2]) and names(found.adapted) == {NAMES[2]}
    found = select(Net, (), ("h_embed",), AdapterConfig(rank=1))
    assert names(found.adapted) == {NAMES[2]}
    with pytest.raises(ValueError, match="nothing to train"):
        select(Net, (), ("*",), none)
    with pytest.raises(ValueError, match="adapter.patterns: '.*/bias' matches no parameter"):
        select(Net, (), (), AdapterConfig(rank=1, patterns=("*/bias",)))


def test_both_parts_make_the_whole():
    params = Net.init(None)["params"]
    found = select(Net, ("h_embed/mlp_0/bias",), (), AdapterConfig(rank=2))
    trained, frozen = found.split(params, jax.random.key(0))
    assert trained["fused_blocks_0"]["attn"]["qkv"]["lora_b"].shape == (2, 2, 2, 2)
    assert frozen["h_embed"]["mlp_0"]["kernel"].dtype == jnp.bfloat16
    assert "bias" not in frozen["h_embed"]["mlp_0"]
    whole = found.complete(trained, frozen)
    jax.tree.map(np.testing.assert_array_equal, whole, params)
    same = Selection().split(params)
    assert same[0] is params and same[1] is None and ALL.complete(*same) is params


@pytest.mark.parametrize("moments, size", [("float32", 2.0), ("bfloat16", 1.5), ("factored", 0.52)])
def test_the_optimizers_state_takes_less(moments, size):
    """Bytes relative to the parameters'; each of the three goes downhill."""
    config = OptimizerConfig(
        learning_rate=0.1, warmup_steps=0, decay_steps=(), eps=1e-8, moments=moments
    )
    optimizer = make_optimizer(config)
    params = {"kernel": jnp.ones((128, 160))}
    state = optimizer.init(params)
    nbytes = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    assert nbytes(state) / nbytes(params) == pytest.approx(size, abs=0.01)

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: jnp.square(p["kernel"]).sum())(params)
        updates, state = optimizer.update(grads, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    for _ in range(5):
        params, state = step(params, state)
    assert jnp.abs(params["kernel"]).max() < 0.6


def test_jumps_grow_to_their_full_length():
    t, s = np.float32([0.5, 0.6, 0.9, 0.2]), np.float32([0.5, 0.1, 0.2, 0.1999])
    for step, share in ((0, 0.1), (4, 0.5), (9, 1.0), (50, 1.0)):
        found = anneal(t, s, 1, step, 10)
        np.testing.assert_allclose(found[:3], (t - share * (t - s))[:3], rtol=1e-6)
        assert found[3] <= t[3] - 0.99e-4, "a jump has a length"
    assert anneal(t, s, 1, 0, 0) is s
    for objective in (FlowMatchingConfig(), ShortcutConfig(), make_settings("consistency")):
        with pytest.raises(ValueError, match=f"anneal_steps .* {objective.name} does not have"):
            StepConfig(steps=5, objective=objective, anneal_steps=2)
    assert StepConfig(steps=5, anneal_steps=2).anneal_steps == 2

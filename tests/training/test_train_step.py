"""The training step: its numbers, on one device and on any mesh, and what it changes."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from step_batches import STATS, make_batch

from vcm_jax import ema
from vcm_jax.devices import hlo, sharding
from vcm_jax.devices.layout import Layout
from vcm_jax.models import Conditions, MMDiT, ModelConfig
from vcm_jax.objectives import OBJECTIVES, make_settings
from vcm_jax.objectives.vcm import VCMConfig
from vcm_jax.training.rows import StepConfig
from vcm_jax.training.state import OptimizerConfig, make_init, make_optimizer
from vcm_jax.training.step import train_step

MODEL = ModelConfig(
    latent_dim=4,
    clip_dim=6,
    sync_dim=5,
    text_dim=6,
    hidden_dim=32,
    num_heads=2,
    depth=2,
    fused_depth=1,
    latent_seq_len=12,
    clip_seq_len=4,
    sync_seq_len=8,
    text_seq_len=3,
)
NET = MMDiT(MODEL)
# A large eps: Adam would magnify the rounding of the smallest gradients.
OPTIMIZER = make_optimizer(
    OptimizerConfig(learning_rate=1e-2, warmup_steps=2, decay_steps=(), eps=1e-2)
)
CONFIG = StepConfig(steps=100)


@functools.cache  # the same arguments give the same program, which is compiled once
def make_step(mesh, config=CONFIG, net=NET, **options):
    """(the jitted step, the function that initialises a state, the shardings of the state)."""
    has_target = config.objective.target_ema > 0
    init = make_init(net, STATS, OPTIMIZER, (0.05, 0.1), has_target=has_target)
    shardings = sharding.state_shardings(
        jax.eval_shape(init, jax.random.key(0)), mesh, net.config.num_heads
    )
    layout = Layout(mesh, shardings.params)
    step = jax.jit(
        functools.partial(
            train_step, net=net, optimizer=OPTIMIZER, config=config, layout=layout, **options
        ),
        out_shardings=(shardings, None),
    )
    return step, init, shardings


@functools.cache
def initial_state():
    """The state before the first step, on one device."""
    _, init, shardings = make_step(sharding.make_mesh(1, devices=jax.devices()[:1]))
    return jax.jit(init, out_shardings=shardings)(jax.random.key(0))


def run(mesh, steps=3, config=CONFIG, batch=None, net=NET, sharded_init=False, **options):
    """The state after some steps on a mesh, and the metrics of the last one.

    The initial state comes from one device, or with `sharded_init` from the mesh itself.
    """
    step, init, shardings = make_step(mesh, config, net, **options)
    if sharded_init:
        state = jax.jit(init, out_shardings=shardings)(jax.random.key(0))
    else:
        state = jax.device_put(initial_state(), shardings)
    batch = jax.device_put(batch or make_batch(), sharding.batch_sharding(mesh))
    for _ in range(steps):
        state, metrics = step(state, batch, jax.random.key(7))
    return state, {k: float(v) for k, v in jax.device_get(metrics).compute().items()}


@functools.cache
def one_device():
    return run(sharding.make_mesh(1, devices=jax.devices()[:1]))


def test_one_golden_step():
    """After an intended change of the mathematics or of random streams, update GOLDEN below."""
    state, metrics = one_device()
    assert int(state.step) == 3
    found = [metrics[name] for name in ("loss", "mse_instant", "mse_jump", "grad_norm")]
    np.testing.assert_allclose(found, GOLDEN, rtol=1e-3)


GOLDEN = [0.915824, 2.272166, 0.021335, 2.854533]


ALL_MESHES = [
    (data, fsdp, 8 // data // fsdp)
    for data in (1, 2, 4, 8)
    for fsdp in (1, 2, 4, 8)
    if data * fsdp <= 8
]
FEW_MESHES = [(2, 2, 2), (1, 1, 8)]


@pytest.mark.parametrize(
    "sizes",
    [
        *FEW_MESHES,
        *(pytest.param(s, marks=pytest.mark.slow) for s in {*ALL_MESHES} - {*FEW_MESHES}),
    ],
)
def test_any_mesh_gives_the_numbers_of_one_device(sizes):
    """In float32 over three steps: metrics within 2e-5 (relative), parameters within 1e-5."""
    assert_as_one_device(*run(sharding.make_mesh(*sizes), sharded_init=True))


def assert_as_one_device(other, other_metrics):
    state, metrics = one_device()
    for name in ("loss", "mse_instant", "mse_jump", "grad_norm", "update_norm"):
        np.testing.assert_allclose(other_metrics[name], metrics[name], rtol=2e-5)
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5)
    jax.tree.map(close, other.params, state.params)
    jax.tree.map(close, other.ema, state.ema)


def held(sizes, model=MODEL):
    """(bytes of the state on each device, bytes of the whole state) on a mesh."""
    mesh = sharding.make_mesh(*sizes)
    init = make_init(MMDiT(model), STATS, OPTIMIZER, (0.05, 0.1))
    abstract = jax.eval_shape(init, jax.random.key(0))
    shardings = sharding.state_shardings(abstract, mesh, model.num_heads)
    zeros = functools.partial(jax.tree.map, lambda a: jnp.zeros(a.shape, a.dtype), abstract)
    state = jax.jit(zeros, out_shardings=shardings)()
    found = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(state):
        for shard in leaf.addressable_shards:
            found[shard.device] += shard.data.nbytes
    assert {sharding.device_bytes(abstract, shardings)} == set(found.values())
    return next(iter(found.values())), sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def test_devices_share_the_state():
    assert held((8, 1, 1))[0] == held((8, 1, 1))[1]
    for fsdp, tensor in ((2, 1), (4, 1), (8, 1), (2, 2), (4, 2)):
        here, whole = held((8 // fsdp // tensor, fsdp, tensor))
        assert whole / (fsdp * tensor) <= here < 1.25 * whole / (fsdp * tensor)
    # Two heads do not divide over eight devices: the MLPs alone are split.
    here, whole = held((1, 1, 8))
    assert whole / 8 < here < 0.6 * whole


def test_microbatches_and_remat_give_the_numbers_of_the_whole_batch():
    """Float32, tolerances as between meshes; four microbatches of four rows on four devices."""
    mesh = sharding.make_mesh(2, 2, 1, devices=jax.devices()[:4])
    net = MMDiT(MODEL, remat="products")
    assert_as_one_device(*run(mesh, net=net, accumulate=4))


def test_remat_keeps_less_and_changes_nothing():
    mesh = sharding.make_mesh(1, devices=jax.devices()[:1])
    assert_as_one_device(*run(mesh, net=MMDiT(MODEL, remat="full")))
    state = jax.eval_shape(make_step(mesh)[1], jax.random.key(0))

    def residuals(remat):
        """The count of numbers that the backward pass of the network keeps."""
        net = MMDiT(MODEL, remat=remat)
        args = (jnp.zeros((4, 12, 4)), jnp.ones(4), jnp.zeros(4))
        cond = Conditions(jnp.zeros((4, 4, 6)), jnp.zeros((4, 8, 5)), jnp.zeros((4, 3, 6)))
        variables = {"params": state.params, "stats": state.stats}

        def apply(variables):
            return net.apply(variables, *args, cond)

        _, backward = jax.eval_shape(lambda variables: jax.vjp(apply, variables), variables)
        return sum(leaf.size for leaf in jax.tree.leaves(backward))

    assert residuals("full") < residuals("products") < residuals("none")


def test_a_step_that_is_not_finite_can_be_left_out():
    mesh = sharding.make_mesh(1, devices=jax.devices()[:1])
    step, _, _ = make_step(mesh, skip_nonfinite=True)
    state = initial_state()
    bad = make_batch() | {"latent_mean": np.full((16, 12, 4), np.inf, np.float32)}
    after, metrics = step(state, bad, jax.random.key(7))
    assert float(metrics.nonfinite.compute()) == 1 and int(after.step) == 1
    jax.tree.map(np.testing.assert_array_equal, after.replace(step=0), state.replace(step=0))
    good, metrics = step(after, make_batch(), jax.random.key(7))
    assert float(metrics.nonfinite.compute()) == 0
    biases = [state.params["final_layer"]["conv"]["bias"] for state in (good, after)]
    assert not np.array_equal(*biases)


def compiled_collectives(sizes, net, batch_size=64):
    """(the collectives of the compiled step, shapes of the state, its shardings)."""
    mesh = sharding.make_mesh(*sizes)
    step, init, shardings = make_step(mesh, net=net)
    state = sharding.place(jax.eval_shape(init, jax.random.key(0)), shardings)
    rows = sharding.batch_sharding(mesh)
    batch = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=rows), make_batch(batch_size)
    )
    program = step.lower(state, batch, jax.random.key(0)).compile().as_text()
    return list(hlo.collectives(hlo.parse(program), mesh)), state, shardings


@pytest.mark.parametrize("sizes", [(4, 2, 1), pytest.param((8, 1, 1), marks=pytest.mark.slow)])
def test_the_step_gathers_weights_once_and_no_rows(sizes):
    """Rows stay on their devices, and gradients are summed in float32, whatever the dtype."""
    net = MMDiT(MODEL, jnp.bfloat16)
    found, state, shardings = compiled_collectives(sizes, net)
    assert {c.kind for c in found} <= {"all-gather", "all-reduce", "reduce-scatter"}
    assert all(c.runs == 1 for c in found)
    gathered = collections.Counter(
        shape for c in found if c.kind == "all-gather" for shape in c.shapes
    )
    pairs = zip(jax.tree.leaves(state.params), jax.tree.leaves(shardings.params))
    split = [leaf.shape for leaf, s in pairs if sizes[1] > 1 and "fsdp" in s.spec]
    assert gathered == collections.Counter(split)
    sums = [c for c in found if c.kind != "all-gather"]
    assert {dtype for c in sums for dtype in c.dtypes} <= {"f32", "s32"}
    summed = sum(np.prod(shape) for c in sums if "data" in c.axes for shape in c.shapes)
    # The last joint block has a few weights without effect, whose gradients XLA knows to be 0.
    assert summed >= 0.999 * sum(leaf.size for leaf in jax.tree.leaves(state.params)) / sizes[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in OBJECTIVES if n not in ("vcm", "reflow")])
def test_any_mesh_gives_every_objective_s_numbers_of_one_device(name):
    """Also in microbatches, except for those whose rows depend on each other."""
    config = dataclasses.replace(CONFIG, objective=make_settings(name))
    net = MMDiT(dataclasses.replace(MODEL, guidance_input=config.objective.guidance_input))
    args = dict(net=net, sharded_init=True)
    state, metrics = run(sharding.make_mesh(1, devices=jax.devices()[:1]), 2, config, **args)
    accumulate = 1 if config.objective.couples_rows else 2
    mesh = sharding.make_mesh(2, 2, 2)
    other, other_metrics = run(mesh, 2, config, accumulate=accumulate, **args)
    np.testing.assert_allclose(other_metrics["loss"], metrics["loss"], rtol=2e-5)
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5)
    jax.tree.map(close, other.params, state.params)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vcm", "wcfm"])
def test_any_mesh_gives_the_same_options_of_any_objective(name):
    """Device by device, and as one program of the whole batch."""
    options = {"target_ema": 0.5} if name == "vcm" else {}
    config = dataclasses.replace(CONFIG, objective=make_settings(name, **options), dispersive=30.0)
    one = sharding.make_mesh(1, devices=jax.devices()[:1])
    state, metrics = run(one, 3, config, sharded_init=True)
    other, other_metrics = run(sharding.make_mesh(2, 2, 2), 3, config, sharded_init=True)
    np.testing.assert_allclose(other_metrics["loss"], metrics["loss"], rtol=1e-4)
    assert metrics["dispersive"] < -5e-5  # activations of this network are small at first
    np.testing.assert_allclose(other_metrics["dispersive"], metrics["dispersive"], atol=2e-6)
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5)
    jax.tree.map(close, other.params, state.params)
    jax.tree.map(close, other.target, state.target)


@pytest.mark.slow
def test_any_mesh_draws_the_same_guidance():
    config = dataclasses.replace(CONFIG, objective=make_settings("vcm", guidance="conditioned"))
    net = MMDiT(dataclasses.replace(MODEL, guidance_input=True))
    one = sharding.make_mesh(1, devices=jax.devices()[:1])
    args = dict(net=net, sharded_init=True)
    state, metrics = run(one, 4, config, **args)
    other, other_metrics = run(sharding.make_mesh(2, 2, 2), 4, config, accumulate=2, **args)
    np.testing.assert_allclose(other_metrics["loss"], metrics["loss"], rtol=2e-5)
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5)
    jax.tree.map(close, other.params, state.params)
    assert state.params["g_embed"]["mlp_2"]["kernel"].any(), "it is trained"


def test_heads_that_do_not_divide_are_replicated():
    mesh = sharding.make_mesh(2, 1, 4)
    init = make_init(NET, STATS, OPTIMIZER, (0.05,))
    specs = sharding.state_shardings(jax.eval_shape(init, jax.random.key(0)), mesh, 2).params
    block = specs["fused_blocks_0"]
    assert "tensor" not in block["attn"]["qkv"]["kernel"].spec
    assert block["ffn"]["w1"]["kernel"].spec[-1] == "tensor"
    assert block["ffn"]["w2"]["kernel"].spec[-2] == "tensor"


@pytest.mark.parametrize(
    "sizes, message",
    [
        ((3, 1, 1), "8 devices"),
        ((-1, 3, 1), "8 devices"),
        ((-1, -1, 1), "one is"),
        ((0, 8, 1), "positive"),
    ],
)
def test_meshes_that_do_not_fit(sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(*sizes)


def test_batch_that_the_devices_do_not_divide():
    with pytest.raises(ValueError, match="batch_size 12 .* 8 devices"):
        sharding.check_batch_size(12, sharding.make_mesh(2, 4, 1))


def test_randomness_is_a_function_of_the_step():
    mesh = sharding.make_mesh(1, devices=jax.devices()[:1])
    step, _, shardings = make_step(mesh)  # the program of `one_device`
    state = initial_state()
    batch = jax.device_put(make_batch(), sharding.batch_sharding(mesh))

    def losses(state):
        state = jax.device_put(state, shardings)
        return float(step(state, batch, jax.random.key(7))[1].loss.compute())

    assert losses(state) == losses(state)
    assert losses(state) != losses(state.replace(step=state.step + 1))


def test_ema_weights_follow_the_parameters():
    first, _ = run(sharding.make_mesh(1, devices=jax.devices()[:1]), steps=1)
    jax.tree.map(np.testing.assert_array_equal, first.ema["0.05"], first.params)
    state, _ = one_device()
    params = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state.params)])

    def distance(width):
        kept = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state.ema[width])])
        return np.linalg.norm(kept - params)

    assert 0 < distance("0.05") < distance("0.1")
    assert ema.gamma_from_sigma_rel(0.05) > ema.gamma_from_sigma_rel(0.1)


def test_targets_take_ema_parameters():
    """The average by hand, and its effect."""
    objective = make_settings("vcm", target_ema=0.5)
    config = dataclasses.replace(CONFIG, objective=objective)
    step, _, _ = make_step(sharding.make_mesh(1, devices=jax.devices()[:1]), config)
    state = initial_state().replace(target=initial_state().params)
    batch, params = make_batch(), []
    for _ in range(3):
        state, _ = step(state, batch, jax.random.key(7))
        params.append(state.params)
    by_hand = jax.tree.map(lambda a, b, c: (a + b + 2 * c) / 4, *params)
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6)
    jax.tree.map(close, state.target, by_hand)
    # In the first two steps the average is that of one step: the parameters themselves.
    plain = one_device()[0]
    kernels = [np.asarray(s.params["final_layer"]["conv"]["kernel"]) for s in (plain, state)]
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-4 and plain.target is None


@pytest.mark.slow
def test_all_rows_instant_or_none():
    for ratio in (0.0, 1.0):
        config = dataclasses.replace(CONFIG, objective=VCMConfig(p=0.0, instant_ratio=ratio))
        _, metrics = run(sharding.make_mesh(1, devices=jax.devices()[:1]), 1, config)
        assert np.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0
        assert np.isnan(metrics["mse_instant" if ratio == 0 else "mse_jump"])

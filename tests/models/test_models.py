"""The network against MMAudio's code with the second time embedding (tests/fixtures/network)."""

import dataclasses
import functools
import json
import re

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vcm_jax.interop.weights import abstract_variables, variables_from_torch, variables_to_torch
from vcm_jax.models import MODELS, Conditions, MMDiT, ModelConfig
from vcm_jax.models.mmdit import nearest_exact_rows, nearest_time_rows
from vcm_jax.records.sequence import SequenceConfig

TOLERANCE = 1e-4  # max |difference| / std; never relaxed
NETWORK = golden.DATA / "network"


def load(folder, name, state_dict_file, boosted=()):
    """(config, variables, state dict, inputs, reference arrays) of one golden network."""
    info, arrays = golden.load(folder, name)
    config = ModelConfig(**info["config"])
    table = json.loads((folder / state_dict_file).read_text())
    state_dict = golden.fill(table, boosted=boosted)
    return info, config, variables_from_torch(state_dict, config), state_dict, arrays


def inputs(info, config, batch):
    seeds = info["seeds"]
    x = golden.randn(seeds["latent"], (batch, config.latent_seq_len, config.latent_dim))
    cond = Conditions(
        golden.randn(seeds["clip_f"], (batch, config.clip_seq_len, config.clip_dim)),
        golden.randn(seeds["sync_f"], (batch, config.sync_seq_len, config.sync_dim)),
        golden.randn(seeds["text_f"], (batch, config.text_seq_len, config.text_dim)),
    )
    return x, golden.uniform(seeds["t"], batch), golden.uniform(seeds["s"], batch), cond


@functools.cache
def small():
    info, config, variables, state_dict, arrays = load(NETWORK, "small", "small_state_dict.json")
    return config, variables, state_dict, arrays, inputs(info, config, info["batch"])


def check_outputs(config, variables, arrays, x, t, s, cond):
    apply = jax.jit(MMDiT(config).apply)
    null = MMDiT(config).apply(variables, len(x), method="null_conditions")
    no_video = dataclasses.replace(cond, clip=null.clip, sync=null.sync)
    no_text = dataclasses.replace(cond, text=null.text)
    for name, args in {
        "output": (x, t, s, cond),
        "output_s_eq_t": (x, t, t, cond),
        "output_null": (x, t, s, null),
        "output_null_video": (x, t, s, no_video),
        "output_null_text": (x, t, s, no_text),
    }.items():
        error = golden.relative_error(apply(variables, *args), arrays[name])
        assert error < TOLERANCE, f"{name}: {error}"

    def method(name):
        return jax.jit(functools.partial(MMDiT(config).apply, method=name))

    enc = method("encode_conditions")(variables, cond)
    cached = method("velocity")(variables, x, t, s, enc)
    assert golden.relative_error(cached, arrays["output"]) < TOLERANCE


def test_outputs_match_the_reference():
    config, variables, _, arrays, (x, t, s, cond) = small()
    np.testing.assert_array_equal(t, arrays["in_t"])
    check_outputs(config, variables, arrays, x, t, s, cond)


def test_every_stage_matches_the_reference():
    config, variables, _, arrays, (x, t, s, cond) = small()
    capture = dict(capture_intermediates=True, mutable=["intermediates"])
    apply = jax.jit(functools.partial(MMDiT(config).apply, **capture))
    _, captured = apply(variables, x, t, s, cond)
    captured = captured["intermediates"]

    def stage(name):
        return captured[name]["__call__"][0]

    rows = nearest_exact_rows(config.sync_seq_len, config.latent_seq_len)
    times = stage("t_embed") + stage("h_embed")
    global_c = (times + stage("global_cond_mlp"))[:, None]
    found = {
        "clip_input_proj": stage("clip_input_proj_1"),
        "sync_input_proj": stage("sync_input_proj_2"),
        "text_input_proj": stage("text_input_proj_1"),
        "audio_input_proj": stage("audio_input_proj_2"),
        "clip_cond_proj": stage("clip_cond_proj"),
        "text_cond_proj": stage("text_cond_proj"),
        "global_cond_mlp": stage("global_cond_mlp"),
        "h_embed": stage("h_embed"),
        "t_embed_plus_h_embed": times,
        "global_c": global_c,
        "sync_upsampled": stage("sync_input_proj_2")[:, rows],
        "extended_c": global_c + stage("sync_input_proj_2")[:, rows],
    }
    for i in range(config.joint_depth):
        block = captured[f"joint_blocks_{i}"]
        for stream, value in zip(("latent", "clip", "text"), block["__call__"][0]):
            found[f"joint_{i}.{stream}"] = value
    for stream in ("latent", "clip", "text"):
        heads = captured["joint_blocks_0"][f"{stream}_block"]["attn"]["__call__"][0]
        for part, value in zip("qkv", heads):
            found[f"joint_0.{stream}.{part}"] = jnp.swapaxes(value, 1, 2)
    for i in range(config.fused_depth):
        found[f"fused_{i}"] = stage(f"fused_blocks_{i}")
    others = r"in_[ts]|output.*|jvp_.*|null\..*|.*_rot|.*freqs|.*attn_in"
    assert found.keys() == {name for name in arrays if not re.fullmatch(others, name)}
    for name, value in found.items():
        assert golden.relative_error(value, arrays[name]) < TOLERANCE, name


def test_position_embedding_of_the_sync_rows():
    info, _ = golden.load(NETWORK, "small_posboost")
    boosted = info["posboost_names"]
    info, config, variables, _, arrays = load(
        NETWORK, "small_posboost", "small_state_dict.json", boosted
    )
    _, _, _, _, (x, t, s, cond) = small()
    output = jax.jit(MMDiT(config).apply)(variables, x, t, s, cond)
    assert golden.relative_error(output, arrays["output"]) < TOLERANCE


def test_the_derivative_along_x_t_s_matches():
    config, variables, _, arrays, (x, t, s, cond) = small()
    info, _ = golden.load(NETWORK, "small")
    v = golden.randn(info["seeds"]["jvp_v"], x.shape)

    def u(x, t, s):
        return MMDiT(config).apply(variables, x, t, s, cond)

    jvp = jax.jit(lambda tangents: jax.jvp(u, (x, t, s), tangents)[1])
    zero, one = np.zeros_like, np.ones_like
    for name, tangents in {
        "jvp_latent": (v, zero(t), zero(s)),
        "jvp_t": (zero(x), one(t), zero(s)),
        "jvp_s": (zero(x), zero(t), one(s)),
        "jvp_all": (v, one(t), zero(s)),
    }.items():
        derivative = jvp(tangents)
        assert golden.relative_error(derivative, arrays[name]) < TOLERANCE, name


def test_gradient_norms_match():
    config, variables, _, _, (x, t, s, cond) = small()
    info, _ = golden.load(NETWORK, "small")

    def loss(params):
        net = MMDiT(config)
        return jnp.square(net.apply({**variables, "params": params}, x, t, s, cond)).mean()

    gradients = variables | {"params": jax.jit(jax.grad(loss))(variables["params"])}
    gradients = variables_to_torch(gradients, config)
    norms = info["grad_norm_of_mean_square_output"]
    for name, norm in norms.items():
        # None: the original code gives the empty features no gradient when they are not used.
        error = abs(np.linalg.norm(gradients[name]) - (norm or 0))
        assert error <= 1e-4 * (norm or 0), name


def test_the_full_size_network_matches_the_reference(shared):
    folder = shared("network/small_16k.npz").parent
    info, config, variables, state_dict, arrays = load(
        folder, "small_16k", "small_16k_state_dict.json"
    )
    assert config == MODELS["small_16k"]
    check_outputs(config, variables, arrays, *inputs(info, config, len(arrays["in_t"])))
    check_round_trip(config, variables, state_dict)


def check_round_trip(config, variables, state_dict):
    back = variables_to_torch(variables, config)
    assert back.keys() == state_dict.keys()
    for name, value in state_dict.items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)
        assert back[name].shape == value.shape, name


def test_the_state_dict_comes_back_bit_for_bit():
    config, variables, state_dict, _, _ = small()
    check_round_trip(config, variables, state_dict)


def test_a_wrong_state_dict_is_described():
    config, _, state_dict, _, _ = small()
    wrong = {k: v for k, v in state_dict.items() if not k.startswith("h_embed.mlp.0")}
    wrong["fused_blocks.9.linear1.bias"] = np.zeros(3)
    wrong["clip_cond_proj.bias"] = np.zeros(65)
    with pytest.raises(ValueError) as error:
        variables_from_torch(wrong, config)
    for part in (
        "missing: h_embed.mlp.0.bias, h_embed.mlp.0.weight",
        "not known: fused_blocks.9.linear1.bias",
        "clip_cond_proj.bias (65,) instead of (64,)",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("name", ["small_16k", "small_44k", "medium_44k", "large_44k", "large_16k"])
def test_parameter_counts(name):
    counts = json.loads((NETWORK / "param_counts.json").read_text())
    reference = counts["large_at_16k" if name == "large_16k" else name]["two_time"]
    variables = abstract_variables(MODELS[name])

    def size(tree):
        return sum(leaf.size for leaf in jax.tree.leaves(tree))

    assert size(variables["params"]) == reference["trainable"]
    assert size(variables) == reference["total"]


def test_nearest_exact_rows_are_those_of_pytorch():
    tables = json.loads((NETWORK / "nearest_exact_indices.json").read_text())
    assert tables
    for name, rows in tables.items():
        source, target = map(int, name.split("->"))
        np.testing.assert_array_equal(nearest_exact_rows(source, target), rows)


def test_lengths_follow_the_duration_and_parameters_do_not():
    longer = MODELS["demo"].with_lengths(SequenceConfig(duration=5.5))
    assert longer.latent_seq_len == 172
    trees = map(abstract_variables, (longer, MODELS["demo"]))
    shapes = [jax.tree.map(lambda leaf: leaf.shape, tree) for tree in trees]
    assert shapes[0] == shapes[1]


def test_bfloat16_stays_close_to_float32():
    config, variables, _, arrays, (x, t, s, cond) = small()
    output = jax.jit(MMDiT(config, dtype=jnp.bfloat16).apply)(variables, x, t, s, cond)
    assert output.dtype == jnp.float32
    difference = np.asarray(output) - arrays["output"]
    assert 1e-4 < difference.std() / arrays["output"].std() < 0.03


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_heads": 5}, "even head size"),
        ({"fused_depth": 4}, "larger than fused_depth"),
        ({"sync_seq_len": 15}, "multiple of 8"),
        ({"audio_kernel": 4}, "odd"),
        ({"latent_dim": 0}, "latent_dim"),
    ],
)
def test_sizes_that_do_not_fit(change, message):
    config, *_ = small()
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **change)


def test_features_of_another_shape():
    config, variables, _, _, (x, t, s, cond) = small()
    with pytest.raises(ValueError, match=r"clip features .* takes \(B, 8, 24\)"):
        MMDiT(config).apply(variables, x, t, s, dataclasses.replace(cond, clip=cond.sync))
    with pytest.raises(ValueError, match=r"latents .* takes \(B, 25, 8\)"):
        MMDiT(config).apply(variables, x[:, :-1], t, s, cond)


def test_sync_rows_by_time_are_the_nearest_ones():
    """Row r of segment k lies at (8 k + 2 r + 1) / 25 s; index spreading is up to 0.27 s off."""
    for seconds, tokens, rate in ((8.0, 250, 31.25), (2.56, 80, 31.25), (8.0, 345, 44_100 / 1024)):
        sequence = SequenceConfig(duration=seconds)
        times = np.array(
            [(8 * (j // 8) + 2 * (j % 8) + 1) / 25 for j in range(sequence.sync_seq_len)]
        )
        middle = (np.arange(tokens) + 0.5) / rate
        rows = nearest_time_rows(sequence.sync_seq_len, tokens, rate)
        nearest = np.abs(middle[:, None] - times[None]).min(1)
        np.testing.assert_allclose(np.abs(times[rows] - middle), nearest, atol=1e-9)
        assert nearest.max() < 0.0401 and (np.diff(times[rows]) >= -1e-9).all()
        # Of two rows at the same time the one further inside its segment.
        inside = (times[rows] > 9 / 25) & (times[rows] < times[-1] - 8 / 25)
        assert (np.abs(rows[inside] % 8 - 3.5) <= 2).all()
        by_index = times[nearest_exact_rows(sequence.sync_seq_len, tokens)]
        assert 0.2 < np.abs(by_index - middle).max() < 0.3


def test_the_alignment_of_the_sync_rows_is_a_setting_of_the_model():
    config = dataclasses.replace(MODELS["demo"], sync_alignment="time", hidden_dim=16)
    plain = dataclasses.replace(config, sync_alignment="index")
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    cond = Conditions(normal(1, 20, 64), normal(1, 56, 256), normal(1, 77, 32))
    x, t = normal(1, 80, 20), np.float32([0.5])
    variables = MMDiT(config).init(jax.random.key(0), x, t, t, cond)
    noisy = jax.tree.map(
        lambda a: a + 0.1 * jax.random.normal(jax.random.key(1), a.shape), variables
    )
    found, other = (MMDiT(c).apply(noisy, x, t, t, cond) for c in (config, plain))
    assert np.abs(found - other).max() > 1e-3
    assert MODELS["small_44k"].latent_rate == pytest.approx(345 / 8, rel=2e-3)
    with pytest.raises(ValueError, match="sync_alignment must be one of index, time, not 'row'"):
        dataclasses.replace(config, sync_alignment="row")

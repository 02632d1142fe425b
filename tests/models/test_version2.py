"""MMAudio's second version of the network, against numbers of its own code.

The angles of its time embedder reach 10^4, where float32 has steps of up to 1e-3: MMAudio's float32
outputs are 3e-4 off its float64 ones, so that they are compared at 3e-3.
"""

import dataclasses
import functools
import json

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vcm_jax import sampling
from vcm_jax.interop import import_network
from vcm_jax.interop.export_torch import to_mmaudio
from vcm_jax.interop.weights import torch_shapes, variables_from_torch, variables_to_torch
from vcm_jax.models import MODELS, Conditions, MMDiT, ModelConfig, layers

NETWORK = golden.DATA / "network"
INFO, ARRAYS = golden.load(NETWORK, "small_v2")
CONFIG = ModelConfig(**{k: v for k, v in INFO["config"].items() if k != "v2"}, version=2)


@functools.cache
def state_dict():
    """As MMAudio's file."""
    return golden.fill(json.loads((NETWORK / "small_v2_state_dict.json").read_text()))


@functools.cache
def as_it_is():
    """Variables in MMAudio's convention; the second embedder gives zero."""
    shapes = torch_shapes(CONFIG)
    second = {n: np.zeros(s, np.float32) for n, s in shapes.items() if n.startswith("h_embed.")}
    return variables_from_torch(state_dict() | second, CONFIG)


@functools.cache
def reversed_time():
    """Variables in our convention."""
    return import_network.network_from_torch(state_dict(), CONFIG)


def inputs(dtype=np.float32):
    """(latents, MMAudio's time, conditions, negative text)."""
    c, seeds, batch = CONFIG, INFO["seeds"], INFO["batch"]
    x = golden.randn(seeds["latent"], (batch, c.latent_seq_len, c.latent_dim))
    cond = Conditions(
        golden.randn(seeds["clip_f"], (batch, c.clip_seq_len, c.clip_dim)),
        golden.randn(seeds["sync_f"], (batch, c.sync_seq_len, c.sync_dim)),
        golden.randn(seeds["text_f"], (batch, c.text_seq_len, c.text_dim)),
    )
    tau = golden.uniform(seeds["tau"], batch)
    negative = golden.randn(seeds["negative_text"], cond.text.shape)
    return jax.tree.map(lambda a: a.astype(dtype), (x, tau, cond, negative))


def conditions():
    """{golden array: the conditions of that output}."""
    _, tau, cond, negative = inputs()
    null = MMDiT(CONFIG).apply(reversed_time(), len(tau), method="null_conditions")
    return {
        "output": cond,
        "output_null": null,
        "output_negative_text": dataclasses.replace(null, text=negative),
    }


def test_stages_match_the_reference():
    x, tau, cond, _ = inputs()
    np.testing.assert_array_equal(tau, ARRAYS["in_tau"])
    capture = dict(capture_intermediates=True, mutable=["intermediates"])
    _, found = MMDiT(CONFIG).apply(as_it_is(), x, tau, tau, cond, **capture)
    for name, module, tolerance in (
        ("audio_input_proj", "audio_input_proj_2", 1e-4),
        ("clip_input_proj", "clip_input_proj_2", 1e-4),
        ("sync_input_proj", "sync_input_proj_2", 1e-4),
        ("text_input_proj", "text_input_proj_2", 1e-4),
        ("t_embed", "t_embed", 3e-3),
    ):
        stage = found["intermediates"][module]["__call__"][0]
        assert golden.relative_error(stage, ARRAYS[name]) < tolerance, name


def test_imported_weights_are_minus_mmaudios_velocity_at_the_reversed_time():
    x, tau, _, _ = inputs()
    apply = jax.jit(MMDiT(CONFIG).apply)
    t = np.float32(1 - tau.astype(np.float64))
    for name, cond in conditions().items():
        for s in (t, np.zeros_like(t)):
            output = apply(reversed_time(), x, t, s, cond)
            assert golden.relative_error(-output, ARRAYS[name]) < 3e-3, name


def test_five_steps_with_guidance_against_a_negative_prompt():
    x, *_ = inputs()
    found = conditions()
    u = functools.partial(jax.jit(MMDiT(CONFIG).apply), reversed_time())
    guided = sampling.guided_velocity(u, found["output_negative_text"], 4.5)
    output = sampling.sample(guided, x, sampling.uniform_times(5), found["output"])
    assert golden.relative_error(output, ARRAYS["euler5_guidance4.5_negative_text"]) < 3e-3


def test_in_float64_the_formula_is_the_same():
    """Its distance to MMAudio's float32 output is that of MMAudio's own float64 output."""
    with jax.enable_x64(True):
        x, tau, cond, _ = inputs(np.float64)
        apply = jax.jit(MMDiT(CONFIG, dtype=jnp.float64).apply)
        double = functools.partial(jax.tree.map, lambda a: a.astype(np.float64))
        output = np.asarray(apply(double(as_it_is()), x, tau, tau, cond))
        t = 1 - tau
        imported = np.asarray(apply(double(reversed_time()), x, t, t, cond))
    assert output.dtype == np.float64
    distance = np.abs(output - ARRAYS["output"]).max()
    # The golden difference is rounded to float32: 1.2e-7 at the values' size.
    assert abs(distance - INFO["max_abs_diff_float32_vs_float64_output"]) < 2.4e-7
    assert golden.relative_error(-imported, output) < 1e-6


def test_float32_loses_no_digits_of_the_angles():
    x, tau, cond, _ = inputs()
    output = MMDiT(CONFIG).apply(as_it_is(), x, tau, tau, cond)
    with jax.enable_x64(True):
        double = jax.tree.map(lambda a: a.astype(np.float64), (as_it_is(), *inputs(np.float64)[:3]))
        variables, x, tau, cond = double
        exact = MMDiT(CONFIG, dtype=jnp.float64).apply(variables, x, tau, tau, cond)
        exact = np.asarray(exact)
    assert golden.relative_error(output, exact) < 2e-5


@pytest.mark.parametrize("version, features", [(1, 64), (2, 896)])
def test_angles(version, features):
    """Of times between -1 and 1, without whole turns; their derivatives are the frequencies."""
    frequencies = layers.time_frequencies(version, features)
    times = np.random.default_rng(0).uniform(-1, 1, 200).astype(np.float32)
    times = np.append(times, np.float32([-1, 0, 1]))
    angles = layers.time_angles(times, frequencies)
    exact = times.astype(np.float64)[:, None] * frequencies
    assert np.abs(np.exp(1j * np.float64(angles)) - np.exp(1j * exact)).max() < 2e-6
    of_time = jax.jvp(lambda t: layers.time_angles(t, frequencies), (times,), (0 * times + 1,))[1]
    np.testing.assert_allclose(of_time, np.broadcast_to(frequencies, of_time.shape), rtol=1e-6)


def test_frequencies():
    one, two = layers.time_frequencies(1, 896), layers.time_frequencies(2, 896)
    assert (len(one), len(two)) == (128, 448)
    np.testing.assert_allclose(one, 10_000.0 ** (-np.arange(0, 256, 2) / 256))
    np.testing.assert_allclose(two, 10_000 * 10_000.0 ** (-np.arange(0, 896, 2) / 896), rtol=1e-6)
    np.testing.assert_array_equal(two, np.float32(two))


def test_the_state_dict_comes_back():
    variables = reversed_time()
    again = to_mmaudio(variables_to_torch(variables, CONFIG))
    assert again.keys() == state_dict().keys()
    for name, value in state_dict().items():
        np.testing.assert_allclose(again[name], value, atol=1e-6, err_msg=name)


def test_the_second_embedder_has_the_frequencies_of_the_version():
    """What it says of s = t goes into MMAudio's convention."""
    rng = np.random.default_rng(0)
    shapes = torch_shapes(CONFIG)
    second = {
        name: rng.standard_normal(shape).astype(np.float32) / 8
        for name, shape in shapes.items()
        if name.startswith("h_embed.")
    }
    two_times = state_dict() | second
    x, t, cond, _ = inputs()
    before = MMDiT(CONFIG).apply(variables_from_torch(two_times, CONFIG), x, t, t, cond)
    ours = import_network.network_from_torch(to_mmaudio(two_times), CONFIG)
    assert golden.relative_error(MMDiT(CONFIG).apply(ours, x, t, t, cond), before) < 1e-5


def test_the_version_is_recognised():
    config = MODELS["large_44k_v2"]
    assert dataclasses.replace(config, version=1) == MODELS["large_44k"]
    for name in ("large_44k", "large_44k_v2", "small_44k", "small_16k"):
        shapes = torch_shapes(MODELS[name])
        empty = {n: np.broadcast_to(np.float32(0), shape) for n, shape in shapes.items()}
        assert import_network.recognise(empty, "file") == name


@pytest.mark.parametrize("version", [0, 3, "2"])
def test_other_versions_are_refused(version):
    with pytest.raises(ValueError, match="model.version must be an integer in .1, 2."):
        dataclasses.replace(CONFIG, version=version)


def test_the_torch_model_computes_the_same():
    torch = pytest.importorskip("torch")
    from vcm_jax.interop.torch_model import AverageVelocity

    variables = reversed_time()
    second = variables["params"]["h_embed"]["mlp_2"]
    second["kernel"] = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32) / 8
    tensors = {n: torch.from_numpy(v) for n, v in variables_to_torch(variables, CONFIG).items()}
    model = AverageVelocity.from_state_dict(tensors)
    x, t, cond, _ = inputs()
    s = t * np.float32([0.0, 0.3, 1.0])
    with torch.no_grad():
        output = model(*map(torch.from_numpy, (x, t, s, cond.clip, cond.sync, cond.text)))
    expected = MMDiT(CONFIG).apply(variables, x, t, s, cond)
    assert golden.relative_error(output.numpy(), expected) < 1e-4

"""The network on given variables: encoded conditions, missing modalities, sampled latents."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from vcm_jax import sampling
from vcm_jax.models import Conditions, MMDiT, ModelConfig
from vcm_jax.models.conditioned import encode_features, sample_latents, zero_inputs
from vcm_jax.objectives import make_settings
from vcm_jax.objectives.guidance import Guidance

CONFIG = ModelConfig(
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
NET = MMDiT(CONFIG)


@functools.cache
def example():
    """(variables with noise everywhere, features of four clips, noise)."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    shapes = jax.eval_shape(NET.init, jax.random.key(0), *zero_inputs(CONFIG))
    variables = jax.tree.map(lambda leaf: 0.2 * normal(*leaf.shape), shapes)
    features = {
        "clip": normal(4, 4, 6).astype(np.float16),
        "sync": normal(4, 8, 5).astype(np.float16),
        "text": normal(4, 3, 6).astype(np.float16),
        "has_video": np.array([True, False, True, False]),
        "has_text": np.array([True, True, False, False]),
    }
    return variables, features, normal(4, 12, 4)


def raw_conditions():
    """The features of the example with the empty ones filled in by hand."""
    variables, features, _ = example()
    null = NET.apply(variables, 4, method="null_conditions")
    missing = {"clip": ~features["has_video"], "sync": ~features["has_video"]}
    missing["text"] = ~features["has_text"]
    filled = {
        name: np.where(rows[:, None, None], getattr(null, name), features[name])
        for name, rows in missing.items()
    }
    return Conditions(**filled), null


def test_the_network_takes_encoded_conditions_with_empty_ones_filled_in():
    variables, features, x = example()
    u, cond, null_cond = encode_features(NET, variables, features)
    t, s = np.float32([1.0, 0.7, 0.5, 0.2]), np.float32([0.3, 0.1, 0.5, 0.0])
    raw, null = raw_conditions()
    for encoded, plain in ((cond, raw), (null_cond, null)):
        expected = NET.apply(variables, x, t, s, plain)
        np.testing.assert_allclose(u(x, t, s, encoded), expected, atol=1e-4)
    # The last clip has neither video nor text: its condition is the empty one.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[3], b[3], atol=1e-4), cond, null_cond)


@pytest.mark.parametrize(
    "name, guidance_scale", [("vcm", None), ("vcm", 3.0), ("flow_matching", None)]
)
def test_sampled_latents_are_in_the_units_of_the_data(name, guidance_scale):
    variables, features, noise = example()
    objective, sampler = make_settings(name), sampling.Sampler(guidance_scale)
    times = sampling.uniform_times(2)
    found = sample_latents(NET, variables, features, noise, times, objective, sampler)

    raw, null = raw_conditions()
    scale = guidance_scale or objective.guidance_scale
    x = noise
    for t, s in ((1.0, 0.5), (0.5, 0.0)):
        start, end = np.full(4, t, np.float32), np.full(4, s, np.float32)
        if name == "vcm" and guidance_scale is None:
            velocity = NET.apply(variables, x, start, end, raw)
        else:
            guided, plain = (NET.apply(variables, x, start, start, c) for c in (raw, null))
            velocity = scale * guided + (1 - scale) * plain
        x = x + (s - t) * velocity
    stats = variables["stats"]
    expected = x * stats["latent_std"][None, None] + stats["latent_mean"][None, None]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


def test_guidance_is_an_input_that_starts_without_effect():
    variables, features, noise = example()
    net = MMDiT(dataclasses.replace(CONFIG, guidance_input=True))
    fresh = net.init(jax.random.key(0), *zero_inputs(net.config))["params"]["g_embed"]
    assert fresh["mlp_0"]["kernel"].shape == (3 * 256, 32)
    times = np.full(4, 0.7, np.float32), np.full(4, 0.2, np.float32)

    def ask(embedder, *guidance):
        params = variables["params"] | {"g_embed": embedder}
        u, cond, null = encode_features(net, variables | {"params": params}, features, *guidance)
        return u(noise, *times, cond), u(noise, *times, null)

    u, cond, null = encode_features(NET, variables, features)
    plain = u(noise, *times, cond), u(noise, *times, null)
    jax.tree.map(np.testing.assert_array_equal, ask(fresh, Guidance(3.0, 0.1, 0.8)), plain)

    trained = jax.tree.map(lambda a: a + 0.05, fresh)
    own, empty = ask(trained)
    jax.tree.map(np.testing.assert_array_equal, ask(trained, Guidance())[0], own)
    for other in (Guidance(3.0), Guidance(1.0, 0.1), Guidance(1.0, 0.0, 0.9)):
        changed, still = ask(trained, other)
        assert np.abs(changed - own).max() > 1e-4, other
        np.testing.assert_array_equal(still, empty, "the empty condition has no guidance")
    rows = Guidance(np.float32([1, 3, 1, 3]))
    mixed, _ = ask(trained, rows)
    np.testing.assert_allclose(mixed[::2], own[::2], atol=1e-5)
    np.testing.assert_allclose(mixed[1::2], ask(trained, Guidance(3.0))[0][1::2], atol=1e-5)
    with pytest.raises(ValueError, match="no input for guidance"):
        encode_features(NET, variables, features, Guidance(3.0))


def test_a_sampler_gives_the_network_its_guidance():
    variables, features, noise = example()
    net = MMDiT(dataclasses.replace(CONFIG, guidance_input=True))
    embedder = net.init(jax.random.key(0), *zero_inputs(net.config))["params"]["g_embed"]
    embedder = jax.tree.map(lambda a: a + 0.05, embedder)
    variables = variables | {"params": variables["params"] | {"g_embed": embedder}}
    objective = make_settings("vcm", guidance="conditioned", guidance_scale=2.0)

    def ask(*sampler):
        args = (noise, (1.0, 0.0), objective, sampling.Sampler(*sampler))
        return sample_latents(net, variables, features, *args)

    raw, _ = raw_conditions()
    one, zero = np.ones(4, np.float32), np.zeros(4, np.float32)
    for sampler, guidance in (((), (2.0, 0.0, 0.8)), ((3.0, (0.2, 1.0)), (3.0, 0.2, 1.0))):
        velocity = net.apply(variables, noise, one, zero, raw, Guidance(*guidance))
        stats = variables["stats"]
        expected = (noise - velocity) * stats["latent_std"][None, None]
        expected = expected + stats["latent_mean"][None, None]
        np.testing.assert_allclose(ask(*sampler), expected, rtol=1e-5, atol=1e-4)


def test_the_empty_condition_as_one_more_row_is_the_same():
    config = dataclasses.replace(CONFIG, guidance_input=True)
    net = MMDiT(config)
    shapes = jax.eval_shape(net.init, jax.random.key(0), *zero_inputs(config))
    rng = np.random.default_rng(1)
    variables = jax.tree.map(lambda a: 0.2 * rng.standard_normal(a.shape, np.float32), shapes)
    features = example()[1]
    guidance = Guidance(np.array([1, 2, 3, 4], np.float32), 0.1, 0.9)
    together = encode_features(net, variables, features, guidance, together=True)
    apart = encode_features(net, variables, features, guidance)
    for found, expected in zip(jax.tree.leaves(together[1:]), jax.tree.leaves(apart[1:])):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)

"""MMAudio's codec: parity with the original, windows, folders."""

import json

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mel_input import MODES, chirp
from tiny_codecs import state_dicts, tiny_codec

from vcm_jax.codec import bigvgan, check_codec, load_codec, neural, vae
from vcm_jax.codec.mel import log_mel
from vcm_jax.interop import import_codec
from vcm_jax.records.sequence import SequenceConfig

FRAMES = {"16k": 24, "44k": 16}
BOTH = ["16k", pytest.param("44k", marks=pytest.mark.slow)]


def swap(x):
    """Channels first, as the reference numbers have it; and back."""
    return np.swapaxes(np.asarray(x), 1, 2)


@pytest.fixture(scope="module", params=BOTH)
def mode(request):
    return request.param


@pytest.fixture(scope="module")
def codec(mode):
    return import_codec.codec_from_torch(*state_dicts(mode), mode)


def normal_mel(mode, seed, shape):
    with np.load(golden.DATA / "codec" / "neural.npz") as tables:
        table = lambda name: tables[f"{name}_{mode}"][None, None]
        return table("mean") + table("std") * swap(golden.randn(seed, shape))


def record(module, names):
    """Wraps a module's layers `f(params, name, x)`: their outputs by their names, and an undo."""
    found, patch = {}, pytest.MonkeyPatch()

    def wrap(function):
        def wrapped(params, name, *args):
            found[name] = function(params, name, *args)
            return found[name]

        return wrapped

    for name in names:
        patch.setattr(module, name, wrap(getattr(module, name)))
    return found, patch.undo


def vae_stages(codec, mode) -> dict:
    """Everything that the reference numbers hold of the VAE, channels first."""
    config, seed = MODES[mode][0], {"16k": 9010, "44k": 9110}[mode]
    samples, frames, latents = {"16k": (16_000, 62, 31), "44k": (30_000, 58, 28)}[mode]
    wave = chirp(config, seed, MODES[mode][2], samples)
    mel = np.concatenate(
        [
            log_mel(wave[None], config)[:, :frames],
            normal_mel(mode, seed + 1, (1, config.bands, frames)),
        ]
    )
    latent = swap(golden.randn(seed + 3, (2, codec.latent_dim, latents)))

    @jax.jit
    def run(encoder, decoder, mel, latent):
        names = ("conv", "res_block", "attention", "downsample", "upsample")
        found, undo = record(vae, names)
        try:
            mean, std = vae.encode(encoder, mel)
            found |= {"enc_mean": mean, "enc_std": std, "dec_mel": vae.decode(decoder, latent)}
        finally:
            undo()
        return dict(found)

    found = run(codec._encoder, codec._decoder, mel, latent)
    stage = lambda name: name.replace("encoder.", "stage.enc.").replace("decoder.", "stage.dec.")
    return {stage(name): swap(x) for name, x in found.items()}


def vocoder_stages(codec, mode) -> dict:
    bands, seed = MODES[mode][0].bands, {"16k": 9020, "44k": 9120}[mode]
    mel = normal_mel(mode, seed, (1, bands, FRAMES[mode]))
    bound = jnp.tanh if mode == "16k" else lambda y: jnp.clip(y, -1, 1)

    @jax.jit
    def run(params, mel):
        found, undo = record(bigvgan, ("conv", "upsample", "amp_block", "activation"))
        try:
            y = bigvgan.vocode_unbounded(params, mel)
        finally:
            undo()
        found = {f"stage.{name}": x for name, x in found.items()}
        found["conv_post_before_bound"] = y[..., None]
        found["waveform"] = bigvgan.vocode(params, mel, tanh=mode == "16k")[..., None]
        found["waveform_scaled"] = bound(0.02 * y)[..., None]
        interleave = lambda pair: jnp.stack(pair, 2).reshape(1, -1, pair[0].shape[-1])
        phases = bigvgan.anti_aliased_up(found["stage.ups.0.0"])
        found["stage.resblocks.0.activations.0.upsample"] = interleave(phases)
        act = lambda z: bigvgan.snake_beta(params, "resblocks.0.activations.0", z)
        found["stage.resblocks.0.activations.0.act"] = interleave([act(z) for z in phases])
        return found

    return {name: swap(x) for name, x in run(codec._vocoder, mel).items()}


@pytest.mark.parametrize("network", ["vae", "bigvgan"])
def test_parity_stage_by_stage(codec, mode, network):
    """With a sample of the reference numbers; with all of them where they are at hand."""
    file = {"vae": f"vae_{mode}", "16k": "bigvgan_16k", "44k": "bigvgan_v2_44k"}
    file = file[network if network == "vae" else mode]
    stages = (vae_stages if network == "vae" else vocoder_stages)(codec, mode)
    references = {}
    with np.load(golden.DATA / "codec" / "neural.npz") as arrays:
        for key in arrays:
            if key.startswith(f"{file}/"):
                _, name, stride = key.split("/")
                references[name] = int(stride), arrays[key]
    assert len(references) == {"vae": 30, "bigvgan": 32}[network]
    if (golden.SHARED / "codec").exists():
        about, arrays = golden.load(golden.SHARED / "codec", file)
        for name in references:
            references[name] = about["arrays"][name]["stride"], arrays[name].reshape(-1)
    if network == "bigvgan":
        # Steep where the sound crosses zero: as exact as what is bounded, in that one's units.
        stride, reference = references.pop("waveform")
        scale = 1e-4 * references["conv_post_before_bound"][1].std()
        assert np.abs(stages["waveform"].reshape(-1)[::stride] - reference).max() < scale
    for name, (stride, reference) in references.items():
        error = golden.relative_error(stages[name].reshape(-1)[::stride], reference)
        assert error < 1e-4, f"{name}: {error:.1e}"


@pytest.mark.parametrize("mode", MODES)
def test_names_and_shapes_are_the_original_ones(shared, mode):
    vocoder = {"16k": "bigvgan_16k", "44k": "bigvgan_v2_44k"}[mode]
    for file, shapes in (
        (f"vae_{mode}", import_codec.vae_shapes),
        (vocoder, import_codec.vocoder_shapes),
    ):
        table = json.loads(shared(f"codec/{file}_state_dict.json").read_text())
        names = {name: tuple(shape) for name, shape, *_ in table if not name.endswith(".filter")}
        assert shapes(neural.MODES[mode]) == names


def test_sine():
    x = np.random.default_rng(0).uniform(-1, 1, 100_000)
    for top in (2, 100, 20_000):
        angle = np.float32(top * x)
        found = jax.jit(bigvgan.sin_squared)(angle)
        np.testing.assert_allclose(found, np.sin(np.float64(angle)) ** 2, atol=4e-7)


def test_encode_and_decode(monkeypatch):
    for mode, tokens in (("16k", 32), ("44k", 44)):
        codec = tiny_codec(monkeypatch, mode)
        check_codec(codec, SequenceConfig() if mode == "16k" else SequenceConfig.mode_44k())
        sound = chirp(MODES[mode][0], 0, 3000, codec.sample_rate)  # a second
        mean, std = codec.encode(sound)
        assert mean.shape == std.shape == (tokens, codec.latent_dim) and (std > 0).all()
        back = codec.decode(mean)
        assert back.shape == (tokens * 2 * codec.hop,) and back.dtype == np.float32
        np.testing.assert_array_equal(back, codec.vocode(codec.decode_mel(mean)))
        assert codec.encode(sound[:100])[0].shape == (1, codec.latent_dim)
        codec._vocoder["conv_post.weight"] *= 1e4
        assert np.abs(codec.decode(mean)).max() == 1
        with pytest.raises(ValueError, match=r"\(samples,\), not \(0,\)"):
            codec.encode(sound[:0])
        with pytest.raises(ValueError, match=rf"\(N, {codec.latent_dim}\), not \(5, 7\)"):
            codec.decode(np.zeros((5, 7)))


def test_where_convolutions_take_fewer_products(monkeypatch):
    """In what decodes, in float32 on CPUs. Latents, which records keep, are as before."""
    exact = tiny_codec(monkeypatch)
    short = neural.NeuralCodec("16k", exact.arrays, exact.fingerprint, jnp.bfloat16)
    monkeypatch.setattr(neural.conv, "for_cpus", lambda params: {"replaced": params})
    assert "replaced" in exact._decoder and "replaced" in exact._vocoder
    assert "replaced" not in exact._encoder
    assert "replaced" not in short._decoder and "replaced" not in short._vocoder


def test_bfloat16_products(monkeypatch):
    exact = tiny_codec(monkeypatch)
    short = neural.NeuralCodec("16k", exact.arrays, exact.fingerprint, jnp.bfloat16)
    sound = chirp(MODES["16k"][0], 0, 3000, 16_000)
    error = golden.relative_error(short.encode(sound)[0], exact.encode(sound)[0])
    assert 1e-4 < error < 0.2
    latents = exact.encode(sound)[0]
    error = golden.relative_error(short.decode_mel(latents), exact.decode_mel(latents))
    assert 1e-4 < error < 0.2


@pytest.mark.parametrize("frames", [512, 513, 700, 4000])
def test_windows_cover_the_clip(frames):
    size, starts = neural.windows(frames, 41)
    assert size <= 512 and starts[0] == 0 and starts[-1] + size == frames
    right = size - 41  # where what the windows so far got right ends
    for start in starts[1:]:
        assert start + 41 <= right
        right = start + size - 41
    assert len(starts) == 1 or size % 64 == 0
    assert len(starts) <= frames / 400 + 1


def test_vocoding_in_windows_is_that_of_the_whole(monkeypatch):
    codec = tiny_codec(monkeypatch)
    mel = normal_mel("16k", 0, (1, 80, 300))[0]
    whole = codec.vocode(mel)
    monkeypatch.setattr(neural, "_WINDOW", 128)
    monkeypatch.setattr(neural, "_STEP", 8)
    assert len(neural.windows(300, bigvgan.context(codec._vocoder))[1]) >= 3
    assert np.abs(whole).std() > 0.1
    np.testing.assert_allclose(codec.vocode(mel), whole, atol=1e-5)
    monkeypatch.setattr(bigvgan, "context", lambda params: 3)
    assert np.abs(codec.vocode(mel) - whole).max() > 1e-5  # so much context is needed


def test_save_and_load(monkeypatch, tmp_path):
    codec = tiny_codec(monkeypatch)
    codec.save(tmp_path / "a")
    loaded = load_codec(tmp_path / "a")
    for key in ("name", "mode", "sample_rate", "hop", "latent_downsample", "latent_dim"):
        assert getattr(loaded, key) == getattr(codec, key)
    sound = chirp(MODES["16k"][0], 0, 3000, 8000)
    np.testing.assert_array_equal(loaded.encode(sound)[0], codec.encode(sound)[0])
    loaded.save(tmp_path / "b")
    assert load_codec(tmp_path / "b").fingerprint == codec.fingerprint
    # Another vocoder leaves the latents what they are, another encoder does not.
    change = lambda name: neural.NeuralCodec("16k", codec.arrays | {name: codec.arrays[name] + 1})
    assert change("vocoder.conv_pre.bias").fingerprint == codec.fingerprint
    assert change("encoder.conv_in.weight").fingerprint != codec.fingerprint


def test_damaged_folders(monkeypatch, tmp_path):
    codec = tiny_codec(monkeypatch)
    codec.save(tmp_path)
    meta = json.loads((tmp_path / "codec.json").read_text())
    del meta["hash"]  # earlier versions wrote none
    for change, reason in (
        ({"mode": "48k"}, "mode '48k'; this program reads version 1, modes 16k, 44k"),
        ({"version": 7}, "version 7"),
        ({"fingerprint": "0"}, "do not fit codec.json"),
    ):
        (tmp_path / "codec.json").write_text(json.dumps(meta | change))
        with pytest.raises(ValueError, match=reason):
            load_codec(tmp_path)
    (tmp_path / "codec.json").write_text(json.dumps(meta))
    whole = (tmp_path / "codec.npz").read_bytes()
    (tmp_path / "codec.npz").write_bytes(whole[:-1000])
    with pytest.raises(ValueError, match="codec.npz: missing or damaged"):
        load_codec(tmp_path)
    swapped = dict(codec.arrays) | {"fingerprint": np.array(codec.fingerprint)}
    swapped["vocoder.conv_pre.bias"] = swapped["vocoder.conv_pre.bias"] + 1
    np.savez(tmp_path / "codec.npz", **swapped)
    with pytest.raises(ValueError, match="weights are damaged .vocoder.conv_pre.bias is not the"):
        load_codec(tmp_path).decode(np.ones((2, 20)))
    del meta["hashes"]
    (tmp_path / "codec.json").write_text(json.dumps(meta))
    assert load_codec(tmp_path)._vocoder  # of an earlier version: not checked
    position = whole.index(codec.arrays["encoder.conv_in.weight"].tobytes())
    (tmp_path / "codec.npz").write_bytes(whole[:position] + b"?" + whole[position + 1 :])
    with pytest.raises(ValueError, match="weights are damaged .*encoder.conv_in.weight"):
        load_codec(tmp_path).encode(np.ones(1000))


def test_activations_and_variances_are_bounded(monkeypatch):
    """Which no healthy weights reach, so that the reference numbers do not show it."""
    codec = tiny_codec(monkeypatch)
    sizes, res_block = [], vae.res_block

    def watched(params, name, x):
        y = res_block(params, name, x)
        sizes.append((name, float(jnp.abs(x).max()), float(jnp.abs(y).max())))
        return y

    monkeypatch.setattr(vae, "res_block", watched)
    blocks = ("mid.block_2", "up.2.block.0", "up.1.block.2", "up.0.block.1")
    for name in blocks:
        codec._decoder[f"decoder.{name}.conv2.weight"] *= 1e4
    vae.decode(codec._decoder, golden.randn(0, (1, 6, 20)))
    large = [after for before, after in zip(sizes, sizes[1:]) if before[2] > 256]
    sizes_after = [size for name, size, _ in large if not name.endswith("up.0.block.0")]
    assert len(large) == 4 and sizes_after == [256] * 3
    sizes.clear()
    for name in ("down.1.block.0", "down.2.block.1"):
        codec._encoder[f"encoder.{name}.conv2.weight"] *= 1e4
    codec._encoder["encoder.conv_out.weight"] *= 1e4
    _, std = vae.encode(codec._encoder, golden.randn(1, (1, 12, 80)))
    assert [size for before, (_, size, _) in zip(sizes, sizes[1:]) if before[2] > 256] == [256, 256]
    np.testing.assert_allclose([std.min(), std.max()], np.exp([-15, 10]), rtol=1e-5)


@pytest.mark.parametrize("count", [16, 17, 40, 99])
def test_long_spectrograms_are_decoded_in_windows(monkeypatch, count):
    """Windows of a network without attention join to what it makes of the whole clip."""
    codec, sizes = tiny_codec(monkeypatch), []
    for name, value in (("_WHOLE", 16), ("_LATENTS", 12), ("_OVERLAP", 5)):
        monkeypatch.setattr(neural, name, value)

    def decode(params, latents):
        sizes.append(latents.shape[1])
        mel = np.repeat(latents[..., :1], 80, axis=2)
        return np.stack([mel, 2 * mel], axis=2).reshape(1, -1, 80)

    monkeypatch.setattr(neural, "_decode", decode)
    latents = np.random.default_rng(0).standard_normal((count, codec.latent_dim), np.float32)
    found = codec.decode_mel(latents)
    np.testing.assert_allclose(found, decode(None, latents[None])[0], atol=1e-6)
    assert sizes[:-1] == ([count] if count <= 16 else [12] * -(-(count - 5) // 7))


def test_windows_of_spectrograms_are_cross_faded(monkeypatch):
    codec, calls = tiny_codec(monkeypatch), []
    for name, value in (("_WHOLE", 16), ("_LATENTS", 12), ("_OVERLAP", 6)):
        monkeypatch.setattr(neural, name, value)

    def decode(params, latents):
        calls.append(len(calls))
        return np.full((1, 2 * latents.shape[1], 80), calls[-1], np.float32)

    monkeypatch.setattr(neural, "_decode", decode)
    found = codec.decode_mel(np.zeros((24, codec.latent_dim), np.float32))[:, 0]
    assert (np.diff(found) >= 0).all() and found[0] == 0 and found[-1] == 2
    assert np.diff(found).max() < 0.1  # over 12 frames

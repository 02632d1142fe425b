"""`generate --model`: from an empty cache to sounds, at tiny sizes."""

import dataclasses
import gc
import re
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from commands import run_command

from vcm_jax import generate as command
from vcm_jax.codec import load_codec
from vcm_jax.features import extract
from vcm_jax.features.encoders import load_encoders
from vcm_jax.generation import clips, outputs, run
from vcm_jax.generation.clips import Request, encode_request
from vcm_jax.generation.run import load_public
from vcm_jax.interop.weights import torch_shapes, variables_from_torch
from vcm_jax.media import loudness
from vcm_jax.media.read import probe, read_audio, read_frames, read_image
from vcm_jax.media.write import write_mp4
from vcm_jax.models import MODELS, MMDiT
from vcm_jax.sampling import uniform_times

tiny_weights = pytest.importorskip("tiny_weights", reason="makes PyTorch files")
NAME = "mmaudio_large_44k_v2"
SECONDS = 1.0


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    path = tmp_path_factory.mktemp("videos") / "a.mp4"
    frames = np.random.default_rng(0).integers(0, 255, (25, 32, 48, 3), np.uint8)
    sound = np.random.default_rng(1).uniform(-0.1, 0.1, 44_100)
    write_mp4(path, frames, 25, sound, 44_100)
    return path


@pytest.fixture
def picture(tmp_path):
    image = pytest.importorskip("PIL.Image")
    path = tmp_path / "picture.png"
    image.fromarray(np.random.default_rng(1).integers(0, 255, (40, 30, 3), np.uint8)).save(path)
    return path


def generate(*flags):
    return run_command(command, f"--model={NAME}", *flags)


def stored(path):
    return soundfile.read(path)[0]


def by_hand(request, source, steps, seed=0):
    """The sound as MMAudio makes it: Euler's method from its time 0 (noise) to 1, in its own
    convention, and guidance of 4.5."""
    config, encoders = MODELS["large_44k_v2"], load_encoders(source.encoders)
    staged = dataclasses.replace(load_public(NAME), encoders=encoders)
    item = encode_request(request, staged)
    config = config.with_lengths(item.sequence)
    names = torch_shapes(config)
    second = {n: np.zeros(s, np.float32) for n, s in names.items() if n.startswith("h_embed.")}
    variables = variables_from_torch(tiny_weights.network("44k") | second, config)
    net = MMDiT(config)
    null = net.apply(variables, 1, method="null_conditions")
    row = lambda features, empty: empty if features is None else features[None]
    cond = null.replace(
        clip=row(item.clip, null.clip), sync=row(item.sync, null.sync), text=item.text[None]
    )
    if request.negative_prompt:
        text = encoders.encode_text(request.negative_prompt, item.sequence)
        null = null.replace(text=text[None])
    x = clips._noise(seed, request.id, (1, config.latent_seq_len, config.latent_dim)[1:])[None]
    apply = jax.jit(net.apply)
    for i in range(steps):
        tau = np.full(1, i / steps, np.float32)
        guided, free = (apply(variables, x, tau, tau, c) for c in (cond, null))
        x = x + (4.5 * guided - 3.5 * free) / steps
    stats = variables["stats"]
    latents = np.asarray(x[0]) * stats["latent_std"] + stats["latent_mean"]
    sound = load_codec(source.codec).decode(latents, 0)[: round(item.seconds * 44_100)]
    return loudness.limit(sound, 44_100)[0]


def test_from_an_empty_cache_to_a_video_with_sound(home, server, video, tmp_path):
    out = tmp_path / "out.mp4"
    flags = (f"--video={video}", "--prompt=the dogs", "--steps=2", f"--out={out}")
    done = generate(*flags)
    assert (done.code, "1 written, 0 left out" in done.out) == (0, True), done.err
    assert "CC-BY-NC 4.0" in done.err and "--model" not in done.out
    info = probe(out)
    assert info.has_video and info.duration == pytest.approx(SECONDS, abs=0.01)
    assert np.abs(read_audio(out, 44_100, 44_100)).max() > 1e-3
    server.log.clear()
    assert generate(*flags).code == 0
    assert not server.log


@pytest.mark.parametrize("kind", ["video", "negative", "picture", "sync", "prompt"])
def test_sounds_are_those_of_mmaudios_sampler(home, server, video, picture, tmp_path, kind):
    flags, request = {
        "video": ([f"--video={video}", "--prompt=dogs"], Request("a", video, "dogs")),
        "negative": (
            [f"--video={video}", "--negative_prompt=ball"],
            Request("a", video, negative_prompt="ball"),
        ),
        "picture": ([f"--image={picture}"], Request("picture", None, image=picture)),
        "sync": (
            [f"--video={video}", "--ignore_picture"],
            Request("a", video, ignore_picture=True),
        ),
        "prompt": (["--prompt=the ball"], Request("the ball", None, "the ball")),
    }[kind]
    out = tmp_path / "out.wav"
    done = generate(*flags, "--steps=3", f"--out={out}", "--dtype=float32")
    assert done.code == 0, done.err
    expected = by_hand(request, run.pretrained.load(NAME), 3)
    found = stored(out)
    assert len(found) == len(expected)
    np.testing.assert_allclose(found, expected, atol=2e-3)
    assert np.abs(expected).max() > 1e-2


def test_a_picture_becomes_a_movie(home, server, picture, tmp_path):
    out = tmp_path / "out.mp4"
    done = generate(f"--image={picture}", "--steps=1", f"--out={out}")
    assert done.code == 0, done.err
    found = probe(out)
    assert found.duration == pytest.approx(8, abs=0.05) and found.has_audio
    shown = np.float32(read_frames(out, {5.0: lambda frame: frame})[5.0])
    wanted = read_image(picture)
    assert shown.shape[1:] == wanted.shape
    assert np.abs(shown - shown[0]).max() <= 8  # it stands still
    assert np.abs(shown[0].mean((0, 1)) - wanted.mean((0, 1))).max() < 8
    assert np.abs(read_audio(out, 44_100, 40_000)).max() > 1e-2


def test_records_give_the_sounds_of_their_videos(home, server, video, tmp_path):
    found = run.pretrained.load(NAME)
    records, videos = tmp_path / "records", tmp_path / "videos"
    videos.mkdir()
    videos.joinpath("a.mp4").write_bytes(video.read_bytes())
    source = [f"--videos={videos}", f"--codec={found.codec}", f"--encoders={found.encoders}"]
    done = run_command(extract, *source, f"--out={records}", f"--duration={SECONDS}")
    assert done.code == 0, done.err
    flags = "--steps=2", "--dtype=float32", "--format=wav"
    done = generate(f"--records={records}", f"--out={tmp_path / 'sounds'}", *flags)
    assert done.code == 0, done.err
    done = generate(f"--video={videos}", f"--out={tmp_path / 'others'}", *flags)
    assert done.code == 0, done.err
    sounds, others = (stored(tmp_path / name / "a.wav") for name in ("sounds", "others"))
    np.testing.assert_allclose(sounds, others, atol=0.02 * others.std())  # features are float16


def test_several_takes_have_their_features_in_common(home, server, video, tmp_path, monkeypatch):
    encoded, original = [], clips.encode_video

    def counted(*arguments):
        encoded.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(clips, "encode_video", counted)
    flags = (f"--video={video}", "--steps=1")
    assert generate(*flags, "--seeds=0,7", f"--out={tmp_path / 'take.wav'}").code == 0
    assert len(encoded) == 1
    assert sorted(p.name for p in tmp_path.glob("*.wav")) == ["take_0.wav", "take_7.wav"]
    assert generate(*flags, "--seed=7", f"--out={tmp_path / 'seven.wav'}").code == 0
    takes = [stored(tmp_path / f"{name}.wav") for name in ("take_0", "take_7", "seven")]
    np.testing.assert_allclose(takes[1], takes[2], atol=1e-4)
    assert np.abs(takes[0] - takes[1]).max() > 1e-3


def test_one_stage_is_in_memory_at_a_time(home, server, video, tmp_path, monkeypatch):
    """Encoders, network and codec are freed before the next is loaded, group by group."""
    alive, order = {}, []
    loaded = load_public(NAME)

    def followed(name, load):
        def loader():
            gc.collect()
            assert not [other for other, ref in alive.items() if ref() is not None], order
            order.append(name)
            value = load()
            first = jax.tree.leaves(value)[0] if name == "variables" else value
            alive[name] = weakref.ref(first)
            return value

        return loader

    loaders = {name: followed(name, load) for name, load in loaded.loaders.items()}
    staged = dataclasses.replace(loaded, loaders=loaders)
    monkeypatch.setattr(outputs, "_STAGE_SECONDS", 2 * SECONDS)
    wanted = [(Request(f"{i}", video), tmp_path / f"{i}.wav") for i in range(3)]
    missing = (Request("none", tmp_path / "none.mp4"), tmp_path / "none.wav")
    made = outputs.generate_files(staged, [missing, *wanted, missing], uniform_times(1))
    done = dict(made)
    assert [name for name, reason in done.items() if reason is None] == ["0", "1", "2"]
    assert "no such file" in done["none"]
    assert order == ["encoders", "variables", "codec"] * 2
    assert staged.variables is None and staged.encoders is None


def test_weights_are_held_in_the_dtype_that_is_asked_for(home, server, video):
    sounds = {}
    for dtype in ("float32", "bfloat16"):
        loaded = load_public(NAME, dtype=dtype)
        with loaded.stage("variables") as ready:
            kinds = {leaf.dtype for leaf in jax.tree.leaves(ready.variables["params"])}
            assert kinds == {jnp.dtype(dtype)}
            assert ready.variables["stats"]["latent_std"].dtype == jnp.float32
        with loaded.stage("codec") as ready:
            assert ready.codec.dtype == jnp.dtype(dtype)
        with loaded.stage("encoders") as ready:
            item = encode_request(Request("a", video, "dogs"), ready)
        with loaded.stage("variables") as ready:
            (sounds[dtype],) = clips.generate_latents(ready, [item], uniform_times(2), 0, 1)
    scale = sounds["float32"].std()
    difference = (sounds["bfloat16"] - sounds["float32"]).std() / scale
    assert 1e-4 < difference < 0.3


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--workdir=x", f"--model={NAME}"], "give --model .public weights. or --workdir"),
        ([], "give --model"),
        (["--model=large"], "neither a folder nor a public model"),
        ([f"--model={NAME}", "--checkpoint=3"], "--checkpoint is for --workdir"),
        ([f"--model={NAME}", "--image=nowhere.png"], "--image=nowhere.png: no such file"),
        ([f"--model={NAME}", "--ignore_picture"], "--ignore_picture needs --video"),
        ([f"--model={NAME}", "--seeds=1,x"], "--seeds=1,x: give integers"),
        ([f"--model={NAME}", "--seeds=1,1"], "one is there twice"),
        ([f"--model={NAME}", "--seeds=1", "--seed=2"], "--seed or --seeds"),
    ],
)
def test_flags_that_contradict_each_other(home, server, flags, message, tmp_path):
    done = run_command(command, "--prompt=x", f"--out={tmp_path / 'x.wav'}", *flags)
    assert done.code == 1 and len(done.err.splitlines()) == 1
    assert re.search(message, done.err), done.err
    assert not server.log

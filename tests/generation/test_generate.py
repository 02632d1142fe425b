"""From a workdir and clips to sounds: lengths, pictures, determinism, samplers."""

import argparse
import dataclasses
import json
import re

import av
import numpy as np
import pytest
from small_runs import make_world
from tiny_codecs import tiny_codec

from vcm_jax import generate as command
from vcm_jax import search_times
from vcm_jax.codec import NeuralCodec
from vcm_jax.generation.clips import (
    Features,
    Request,
    encode_request,
    generate,
    generate_latents,
    write,
)
from vcm_jax.generation.run import load_run
from vcm_jax.impacts.report import make_report
from vcm_jax.media.read import probe, read_audio
from vcm_jax.media.write import write_mp4
from vcm_jax.records.source import RecordSource
from vcm_jax.sampling import Sampler, uniform_times


@pytest.fixture(scope="module")
def run(world):
    return load_run(world / "run")


def clip(world, number=0):
    return world / "data/test" / f"{number:06d}.mp4"


def sound_of(run, request, batch_size=1, others=()):
    items = [encode_request(r, run) for r in (*others, request)]
    found = generate(run, items, uniform_times(1), batch_size=batch_size)
    return {item.request.id: sound for item, sound in found}[request.id]


def test_a_video_keeps_its_picture_and_gets_a_sound_of_its_length(world, run, tmp_path):
    item = encode_request(Request("a", clip(world), "a metal ball"), run)
    ((_, sound),) = generate(run, [item], uniform_times(2))
    assert len(sound) == round(1.28 * 16_000) and np.abs(sound).max() > 1e-3
    out = tmp_path / "out.mp4"
    write(item, sound, 16_000, out)
    info = probe(out)
    assert info.has_audio and info.duration == pytest.approx(1.28, abs=0.01)
    packets = lambda path: [
        bytes(packet) for packet in av.open(str(path)).demux(video=0) if packet.size
    ]
    assert packets(out) == packets(clip(world))
    heard = read_audio(out, 16_000, len(sound))
    assert np.corrcoef(heard, sound)[0, 1] > 0.9


def test_the_sound_depends_on_video_prompt_and_id_but_not_on_the_batch(world, run):
    ask = lambda name, number, prompt: Request(name, clip(world, number), prompt)
    first = sound_of(run, ask("a", 0, "x"))
    together = sound_of(run, ask("a", 0, "x"), 3, [ask("b", 1, "y"), ask("c", 2, "z")])
    np.testing.assert_allclose(first, together, atol=1e-4)
    for other in (ask("a", 1, "x"), ask("a", 0, "glass"), ask("b", 0, "x")):
        assert np.abs(sound_of(run, other) - first).max() > 1e-3


def test_other_lengths(world, run, tmp_path):
    longer = tmp_path / "longer.mp4"
    frames = np.random.default_rng(0).integers(0, 255, (60, 32, 32, 3), np.uint8)
    write_mp4(longer, frames, 30)
    request = Request("long", longer)
    assert len(sound_of(run, request)) == 2 * 16_000
    item = encode_request(request, run, duration=0.8)
    assert item.sequence.duration == 0.8 and len(item.clip) == 6
    alone = encode_request(Request("rain", None, "rain"), run, duration=1.5)
    ((_, sound),) = generate(run, [alone], uniform_times(1))
    assert len(sound) == 24_000
    with pytest.raises(ValueError, match=r"longer.mp4: duration 0.3 s is too short"):
        encode_request(request, run, duration=0.3)


def test_a_missing_video_is_the_learned_empty_one(world, run):
    """Without a video the features are the network's own, so that any numbers there are ignored."""
    request = Request("rain", None, "rain")
    item = encode_request(request, run)
    assert item.clip is None and item.sync is None
    zeros = Features(
        request,
        item.sequence,
        item.seconds,
        np.zeros_like(encode_request(Request("v", clip(world)), run).clip),
        np.zeros((item.sequence.sync_seq_len, 5), np.float32),
        item.text,
    )
    (empty,), (other,) = (
        generate_latents(run, [features], uniform_times(1), 0, 1) for features in (item, zeros)
    )
    assert np.abs(empty - other).max() > 1e-3


def test_any_sampler(world, run):
    item = encode_request(Request("a", clip(world), "glass"), run)
    other = encode_request(Request("b", clip(world, 1), "wood"), run)
    ask = lambda items, sampler, times=(1.0, 0.5, 0.0): generate_latents(
        dataclasses.replace(run, sampler=sampler), items, times, 0, len(items)
    )
    own = ask([item], Sampler())[0]
    np.testing.assert_allclose(own, generate_latents(run, [item], (1, 0.5, 0), 0, 1)[0])
    for sampler in (
        Sampler(guidance_scale=1.0),
        Sampler(guidance_scale=3.0),
        Sampler(restart=True),
    ):
        alone = ask([item], sampler)[0]
        assert np.abs(alone - own).max() > 1e-3
        np.testing.assert_allclose(ask([other, item], sampler)[1], alone, atol=1e-4)
    assert np.abs(ask([item], Sampler(), (1.0, 0.8, 0.0))[0] - own).max() > 1e-4
    with pytest.raises(ValueError, match="vcm has its guidance in the weights"):
        dataclasses.replace(run, sampler=Sampler(guidance_interval=(0.0, 0.5)))


def test_searched_times_of_a_run(world):
    run = load_run(world / "run", with_encoders=False)
    source = RecordSource(world / "records")
    u, cond = search_times.run_velocity(run, source, 3)
    noise = np.random.default_rng(0).standard_normal((3, run.model.latent_seq_len, 20), np.float32)
    times, (found, equal) = search_times.search(u, noise, cond, 2, 6)
    assert len(times) == 3 and found > 0 and equal > 0
    with pytest.raises(ValueError, match="has 40 records, 41 are wanted"):
        search_times.run_velocity(run, source, 41)
    with pytest.raises(ValueError, match="val: no such folder"):
        search_times.records_of(world / "run")


@pytest.mark.parametrize("seed", [-1, 2**64 - 1, 2**80 + 7, -(2**63), 2**63])
def test_any_integer_is_a_seed(world, run, seed):
    item = encode_request(Request("a", None, "rain"), dataclasses.replace(run))
    restart = dataclasses.replace(run, sampler=Sampler(restart=True))
    (latent,) = generate_latents(restart, [item], uniform_times(2), seed, 1)
    (other,) = generate_latents(restart, [item], uniform_times(2), 0, 1)
    assert np.isfinite(latent).all() and np.abs(latent - other).max() > 1e-3


def test_an_id_may_hold_any_bytes_of_a_file_name(run):
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    assert len(sound_of(run, Request(name, None, "rain"))) == round(1.28 * 16_000)


def sampler_arguments(**changes):
    given = dict(steps=2, times=[], guidance_scale=None, guidance_interval=None, restart=False)
    return argparse.Namespace(**given | changes)


def test_what_the_command_makes_of_its_sampler_flags():
    assert command.read_sampler(sampler_arguments()) == ((1.0, 0.5, 0.0), Sampler())
    times, sampler = command.read_sampler(
        sampler_arguments(
            times=["1", "0.6", "0"], guidance_scale=4.5, guidance_interval=["0", "0.8"]
        )
    )
    assert times == (1.0, 0.6, 0.0) and sampler == Sampler(4.5, (0.0, 0.8))
    for changes, message in (
        ({"times": ["1", "x"]}, "take numbers: .*'x'"),
        ({"times": ["0", "1"]}, "times must decrease"),
        ({"times": ["1", "0.5"]}, "run from 1 .noise. to 0 .data., not 1 to 0.5"),
        ({"guidance_interval": ["0.5"]}, "guidance_interval"),
    ):
        with pytest.raises(ValueError, match=message):
            command.read_sampler(sampler_arguments(**changes))


def test_folders_that_are_not_runs(world, tmp_path):
    with pytest.raises(ValueError, match="not the workdir of a run"):
        load_run(tmp_path)
    with pytest.raises(ValueError, match="no checkpoint of step 9"):
        load_run(world / "run", step=9)


def test_a_run_in_the_neural_codecs_latents(tmp_path, monkeypatch):
    """From extraction in several processes to a sound, and with other codec folders."""
    codec = tiny_codec(monkeypatch)
    codec.save(tmp_path / "codec")
    make_world(tmp_path, 10, codec=tmp_path / "codec", workers=2)
    source = RecordSource(tmp_path / "records")
    assert source.manifest.codec["fingerprint"] == codec.fingerprint and len(source) == 10
    heard = read_audio(tmp_path / "data/train/000000.mp4", 16_000, 40 * 512)
    record = next(source[i] for i in range(10) if source[i]["id"] == "000000")
    for name, value in zip(("latent_mean", "latent_std"), codec.encode(heard)):
        np.testing.assert_allclose(record[name], value, atol=1e-5)
    same = (tmp_path / "run/codec/codec.npz").stat().st_ino
    assert same == (tmp_path / "codec/codec.npz").stat().st_ino  # a gigabyte is kept once

    request = Request("a", clip(tmp_path), "a metal ball")
    own = sound_of(load_run(tmp_path / "run"), request)
    assert len(own) == round(1.28 * 16_000) and own.std() > 1e-3

    def use(codec, name):
        codec.save(tmp_path / name)
        return load_run(tmp_path / "run", codec_folder=tmp_path / name)

    changed = lambda name: codec.arrays | {name: codec.arrays[name] + 0.1}
    vocoder = NeuralCodec("16k", changed("vocoder.conv_post.bias"))
    assert np.abs(sound_of(use(vocoder, "vocoder"), request) - own).max() > 1e-3
    with pytest.raises(ValueError, match="its fingerprint is .*, that of the training data"):
        use(NeuralCodec("16k", changed("encoder.conv_in.weight")), "other")
    with pytest.raises(ValueError, match="vae codec has sample_rate 44100, the data 16000"):
        use(tiny_codec(monkeypatch, "44k"), "44k")


def test_the_report(world):
    results = make_report(
        world / "run", world / "data", num_clips=3, num_train=40, shown=2, times={"training": 90}
    )
    truth, one = results["true sound"], results["1 step"]
    assert truth["f1"] > 0.85 and truth["frechet"] == 0 and truth["material"] > 0.5
    assert one["f1"] < truth["f1"] and one["frechet"] > 1 and one["frechet_error"] > 0
    page = (world / "run/report.html").read_text()
    assert page.count("<video") == 2 * 4 and page.count("<img") == 1 + 2 and "1.5 min" in page
    videos = sorted((world / "run/videos").glob("*.mp4"))
    assert len(videos) == 2 * 4
    for video in videos:
        assert np.abs(read_audio(video, 16_000)).max() < 1 and probe(video).has_audio
    assert not re.findall(r'(?:src|href)="(?!data:)', page), "the page is self-contained"
    assert f"{truth['f1']:.3f}" in page
    written = json.loads((world / "run/report.json").read_text())
    assert written["clips"] == 3 and written["metrics"]["1 step"] == pytest.approx(one)
    with pytest.raises(ValueError, match="test_impacts.jsonl has 3 clips, 5 are wanted"):
        make_report(world / "run", world / "data", num_clips=5, num_train=5, shown=1)
    with pytest.raises(ValueError, match="at least 2"):
        make_report(world / "run", world / "data", num_clips=1, num_train=5, shown=1)

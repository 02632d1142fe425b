"""Frames, batches, specs, and extraction and generation with (tiny) weights."""

import functools
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_runs import save_run

from vcm_jax.claim import ClaimError
from vcm_jax.codec import fit_linear_codec
from vcm_jax.features import extract as extraction
from vcm_jax.features import shards, work
from vcm_jax.features.encoders import WeightsFreeEncoders, encoders_from_spec, load_encoders
from vcm_jax.features.extract import ExtractError, extract
from vcm_jax.generation.clips import Request, encode_request, generate
from vcm_jax.generation.run import load_run
from vcm_jax.interop import frames
from vcm_jax.interop.encoders import TorchEncoders
from vcm_jax.media.read import read_audio, read_frames
from vcm_jax.media.write import write_mp4, write_sound
from vcm_jax.records.sequence import SequenceConfig
from vcm_jax.records.source import RecordSource
from vcm_jax.sampling import uniform_times

torch = pytest.importorskip("torch")
pytest.importorskip("ftfy")
tiny = pytest.importorskip("tiny_encoders")

RATE = 16_000
SEQUENCE = SequenceConfig(duration=1.28)

HELPERS = Path(__file__).parents[1] / "helpers"


@pytest.fixture(autouse=True)
def sizes(monkeypatch):
    tiny.use_tiny_sizes(monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Three good clips and two bad ones, with captions."""
    folder, rng = tmp_path_factory.mktemp("videos"), np.random.default_rng(0)
    for name, frames_, sound in (("a", 32, 1), ("b", 32, 1), ("c", 40, 1), ("mute", 32, 0)):
        pictures = np.kron(rng.integers(0, 255, (frames_, 6, 9, 3)), np.ones((1, 8, 8, 1)))
        sound = 0.1 * rng.standard_normal(frames_ * 640) if sound else None
        write_mp4(folder / f"{name}.mp4", pictures.astype(np.uint8), 25, sound, RATE)
    (folder / "garbage.mp4").write_bytes(b"no video" * 99)
    names = ["a", "b", "c", "mute", "garbage"]
    rows = [f"{name}\t{'The dogs' if name in 'ac' else 'the ball'}" for name in names]
    (folder / "captions.tsv").write_text("\n".join(["id\tcaption", *rows]) + "\n")
    return folder


@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (50, 51), (300, 211)])
def test_frames_are_resized_as_by_pillow(shape):
    """Pillow's antialiased bicubic is what torchvision's is made after; to one grey level."""
    frame = np.random.default_rng(0).integers(0, 255, (*shape, 3)).astype(np.uint8)
    picture = Image.fromarray(frame)

    def pillow(height, width):  # along the rows first, as torch; left alone it takes the cheaper
        rows = picture.resize((width, frame.shape[0]), Image.BICUBIC)
        return np.asarray(rows.resize((width, height), Image.BICUBIC)).astype(int)

    squashed = frames.squash(frame, 40)
    assert squashed.dtype == np.uint8 and abs(squashed - pillow(40, 40)).max() <= 1
    middle = frames.short_side_crop(frame, 32)
    height, width = (int(32 * side / min(shape)) for side in shape)
    top, left = round((height - 32) / 2), round((width - 32) / 2)
    reference = pillow(height, width)[top : top + 32, left : left + 32]
    assert middle.shape == (32, 32, 3) and abs(middle - reference).max() <= 1
    turned = np.rot90(frame)  # a view with negative strides
    np.testing.assert_array_equal(frames.squash(turned, 40), frames.squash(turned.copy(), 40))


def sampled(video, encoders):
    transforms = encoders.frame_transforms(SEQUENCE)
    return read_frames(video, transforms, SEQUENCE.duration)


def test_features_are_the_networks_own(folder, videos):
    """Scaling, segments of 16 every 8 frames, unit length; nothing depends on the batch size."""
    encoders, one = load_encoders(folder), load_encoders(folder, batch_size=1)
    seen = sampled(videos / "a.mp4", encoders)
    assert seen[8].shape == (10, 34, 34, 3) and seen[25].shape == (32, 32, 32, 3)
    clip, sync = encoders.encode_frames(seen, SEQUENCE)
    assert clip.shape == (10, 12) and sync.shape == (24, 16)
    assert clip.dtype == sync.dtype == np.float32
    mean, std = (
        np.array([0.48145466, 0.4578275, 0.40821073]),
        np.array([0.26862954, 0.26130258, 0.27577711]),
    )
    pictures = torch.from_numpy(((seen[8] / 255 - mean) / std).astype(np.float32))
    segments = np.stack([seen[25][i : i + 16] for i in (0, 8, 16)]) / 127.5 - 1
    segments = torch.from_numpy(segments.astype(np.float32)).permute(0, 1, 4, 2, 3)
    with torch.inference_mode():
        wanted = tiny.clip.image_features(encoders._clip, pictures.permute(0, 3, 1, 2)).numpy()
        rows = encoders._sync(segments).flatten(0, 1).numpy()
    np.testing.assert_allclose(clip, wanted, atol=2e-6)
    np.testing.assert_allclose(sync, rows, atol=1e-5)
    for found, other in zip((clip, sync), one.encode_frames(seen, SEQUENCE)):
        np.testing.assert_allclose(found, other, atol=1e-5)
    captions = ["", "the dogs", "a ball"]
    texts = list(encoders.encode_texts(captions, SEQUENCE))
    for caption, text in zip(captions, texts, strict=True):
        np.testing.assert_allclose(text, one.encode_text(caption, SEQUENCE), atol=2e-6)
        np.testing.assert_allclose(np.linalg.norm(text, axis=1), 1, atol=1e-5)
    assert texts[0].shape == (77, 16)


def test_bfloat16_is_close(folder, videos):
    exact, rough = load_encoders(folder), load_encoders(folder, "bfloat16")
    seen = sampled(videos / "a.mp4", exact)
    for a, b in zip(exact.encode_frames(seen, SEQUENCE), rough.encode_frames(seen, SEQUENCE)):
        assert b.dtype == np.float32 and 1e-6 < np.abs(a - b).max() < 0.1 * a.std() + 0.05
    assert rough.spec()["dtype"] == "bfloat16" and rough.spec()["hash"] == exact.spec()["hash"]


def test_the_spec_knows_weights_by_their_values(folder, tmp_path):
    spec = load_encoders(folder).spec()
    assert json.loads(json.dumps(spec)) == spec
    assert (spec["clip_dim"], spec["sync_dim"], spec["text_dim"]) == (12, 16, 16)
    # CLIP's files beside Synchformer's, in the other format, with another vocabulary file.
    tiny.write_weights(tmp_path / "x")
    model, _, _ = tiny.clip.load_clip(folder / "clip")
    for file in (tmp_path / "x/clip").iterdir():
        file.unlink()
    (tmp_path / "x/clip").rmdir()
    model.save_pretrained(tmp_path / "x")
    tiny.write_vocabulary(tmp_path / "x", "json")
    again = encoders_from_spec(spec, tmp_path / "x")
    assert again.spec() == spec
    without_hash = {k: v for k, v in spec.items() if k not in ("hash", "parameters", "dtype")}
    assert encoders_from_spec(without_hash, folder).spec() == spec
    other = tiny.write_weights(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="^--encoders=.*other: hash of clip is .* were made with"):
        encoders_from_spec(spec, other)
    with pytest.raises(ValueError, match="clip_dim is 12, the features were made with 1024"):
        encoders_from_spec(without_hash | {"clip_dim": 1024}, folder)
    with pytest.raises(ValueError, match="give the folder of their weights, --encoders=DIR"):
        encoders_from_spec(spec)
    with pytest.raises(ValueError, match="without weights, leave it out"):
        encoders_from_spec(WeightsFreeEncoders().spec(), folder)


@pytest.mark.parametrize("package", ["torch", "transformers", "ftfy"])
def test_packages_that_are_not_there(folder, videos, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match="needs .*: pip install .*\\[torch\\]") as caught:
        extract(tmp_path / "r", videos=videos, encoders=folder)
    assert "\n" not in str(caught.value) and not (tmp_path / "r").exists()


def test_the_folder_that_pretrained_fetch_makes(folder, tmp_path):
    (tmp_path / "ext_weights").mkdir()
    (tmp_path / "clip").symlink_to(folder / "clip")
    name = "synchformer_state_dict.pth"
    (tmp_path / "ext_weights" / name).symlink_to(folder / name)
    assert load_encoders(tmp_path).spec() == load_encoders(folder).spec()


def test_folders_without_weights(folder, videos, tmp_path):
    run = functools.partial(extract, tmp_path / "r", videos=videos)
    with pytest.raises(ValueError, match="none: no such folder of encoder weights"):
        run(encoders=tmp_path / "none")
    with pytest.raises(ValueError, match="synchformer_state_dict.pth: no such file"):
        run(encoders=tmp_path)
    with pytest.raises(ExtractError, match="clip_dim: encoders with weights have their own"):
        run(encoders=folder, clip_dim=8)
    with pytest.raises(ExtractError, match="--segments splits sounds"):
        run(segments=True)
    assert not (tmp_path / "r").exists()


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    path = tmp_path_factory.mktemp("codec") / "codec"
    rng = np.random.default_rng(0)
    fit_linear_codec([0.1 * rng.standard_normal(20480).astype(np.float32)]).save(path)
    return path


def test_extraction(folder, videos, codec, tmp_path):
    out = tmp_path / "records"
    manifest = extract(
        out,
        videos=videos,
        captions=videos / "captions.tsv",
        encoders=folder,
        codec=codec,
        duration=1.28,
    )
    encoders = load_encoders(folder)
    assert (manifest.num_records, manifest.num_failures) == (3, 2)
    assert manifest.encoders == encoders.spec()
    assert set(manifest.encoders["hash"]) == {"clip", "vocabulary", "synchformer"}
    assert manifest.encoders["parameters"]["synchformer"] > 10_000
    shapes = {name: field["shape"] for name, field in manifest.fields.items()}
    assert (shapes["clip"], shapes["sync"], shapes["text"]) == ([10, 12], [24, 16], [77, 16])
    source = RecordSource(out)
    for record in source:
        clip, sync = encoders.encode_frames(
            sampled(videos / f"{record['id']}.mp4", encoders), SEQUENCE
        )
        np.testing.assert_array_equal(record["clip"], clip.astype(np.float16))
        np.testing.assert_array_equal(record["sync"], sync.astype(np.float16))
        text = encoders.encode_text(record["caption"], SEQUENCE)
        np.testing.assert_allclose(record["text"], text, atol=1e-3)
    np.testing.assert_allclose(source.empty_text, encoders.encode_text("", SEQUENCE), atol=1e-6)
    reasons = (out / "failures.tsv").read_text()
    assert "mute.mp4: no audio stream" in reasons and "garbage.mp4: unreadable" in reasons
    again = {"videos": videos, "captions": videos / "captions.tsv", "codec": codec}
    with pytest.raises(ClaimError, match="other settings .*encoders"):
        extract(out, **again, duration=1.28)


def test_a_batch_too_large_for_the_device_ends_the_run(
    folder, videos, codec, tmp_path, monkeypatch
):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tiny.clip, "image_features", full)
    with pytest.raises(MemoryError, match="with 8 at a time; give a smaller --encoder_batch"):
        extract(tmp_path / "r", videos=videos, encoders=folder, codec=codec, duration=1.28)


def test_segments_of_sounds(codec, tmp_path):
    rng, sounds = np.random.default_rng(0), tmp_path / "sounds"
    sounds.mkdir()
    noise = lambda seconds: 0.1 * rng.standard_normal(round(seconds * RATE))
    long = noise(4.5)
    long[RATE : 2 * RATE] = 0
    for name, sound in (("long", long), ("almost", noise(1.95)), ("short", noise(0.5))):
        write_sound(sounds / f"{name}.wav", sound, RATE)
    write_sound(sounds / "silent.wav", np.zeros(RATE), RATE)
    captions = tmp_path / "captions.tsv"
    captions.write_text("id\tcaption\nlong\tL\nalmost\tA\nsilent\t\nshort\tS\n")
    run = functools.partial(extract, sounds=sounds, captions=captions, codec=codec, duration=1.0)
    manifest = run(tmp_path / "r", segments=True)
    source = RecordSource(tmp_path / "r")
    names = ["long_0", "long_2", "long_3", "almost_0", "almost_1", "short_0"]
    assert [record["id"] for record in source] == names and manifest.num_failures == 2
    assert [record["caption"] for record in source] == [*"LLLAAS"]
    failures = (tmp_path / "r" / "failures.tsv").read_text().splitlines()[1:]
    assert [line.split("\t")[0] for line in failures] == ["long_1", "silent_0"]
    sequence = SequenceConfig(duration=1.0)
    whole = read_audio(sounds / "long.wav", RATE)
    used = extraction.load_codec(codec)
    mean, _ = used.encode(whole[2 * RATE :][: sequence.num_samples])
    np.testing.assert_array_equal(source[1]["latent_mean"], mean)
    with pytest.raises(ClaimError, match="other settings .*segments"):
        run(tmp_path / "r")


def test_a_journal_survives_a_kill_at_any_byte(tmp_path):
    journal = shards.Journal(tmp_path, 3)
    results = [
        [("a", b"record", np.ones((4, 2)))],
        [("b", None, "why"), ("c", b"", np.zeros(3))],
        [],
    ]
    for entry in results:
        journal.append(entry)
    path = tmp_path / "part-00003.journal"
    whole = path.read_bytes()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        found = shards.Journal(tmp_path, 3).entries
        assert len(found) <= 3 and path.stat().st_size <= size
        for entry, wanted in zip(found, results):
            assert [(r[0], r[1]) for r in entry] == [(r[0], r[1]) for r in wanted]
    np.testing.assert_array_equal(found[0][0][2], np.ones((4, 2)))
    damaged = bytearray(whole)
    damaged[20] ^= 1
    path.write_bytes(bytes(damaged))
    assert shards.Journal(tmp_path, 3).entries == [] and not path.read_bytes()


def test_a_stopped_run_encodes_no_clip_twice(folder, videos, codec, tmp_path, monkeypatch):
    encode, count = TorchEncoders.encode_frames, 0

    def counted(self, seen, sequence):
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        return encode(self, seen, sequence)

    run = functools.partial(
        extract,
        tmp_path / "r",
        videos=videos,
        captions=videos / "captions.tsv",
        encoders=folder,
        codec=codec,
    )
    monkeypatch.setattr(TorchEncoders, "encode_frames", counted)
    with pytest.raises(KeyboardInterrupt):
        run(duration=1.28)
    assert [file.name for file in (tmp_path / "r").glob("part-*")] == ["part-00000.journal"]
    with pytest.raises(ClaimError, match="other settings .*sequence"):
        run(duration=0.8)
    assert run(duration=1.28).num_records == 3 and count == 4
    assert [record["id"] for record in RecordSource(tmp_path / "r")] == ["a", "b", "c"]


def test_generation_needs_the_weights_of_the_features(folder, videos, codec, tmp_path):
    extract(
        tmp_path / "records",
        videos=videos,
        captions=videos / "captions.tsv",
        encoders=folder,
        codec=codec,
        duration=1.28,
    )
    widths = {"clip_dim": 12, "sync_dim": 16, "text_dim": 16}
    save_run(tmp_path, **{f"model_overrides.{name}": width for name, width in widths.items()})
    run = load_run(tmp_path / "run", encoder_folder=folder)
    item = encode_request(Request("a", videos / "a.mp4", "the dogs"), run)
    source = RecordSource(tmp_path / "records")
    np.testing.assert_array_equal(item.clip.astype(np.float16), source[0]["clip"])
    np.testing.assert_array_equal(item.sync.astype(np.float16), source[0]["sync"])
    ((_, sound),) = generate(run, [item], uniform_times(1))
    assert len(sound) == round(1.28 * RATE) and np.isfinite(sound).all() and sound.any()
    with pytest.raises(ValueError, match="give the folder of their weights, --encoders=DIR"):
        load_run(tmp_path / "run")
    other = tiny.write_weights(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="other: hash of clip is"):
        load_run(tmp_path / "run", encoder_folder=other)
    assert load_run(tmp_path / "run", with_encoders=False).encoders is None


# A command with tiny sizes, whose encoder takes its time.
COMMAND = """
import sys, time
sys.path.insert(0, {tests!r})
import tiny_encoders as tiny
from vcm_jax.interop import encoders
from vcm_jax.features import extract
tiny.clip.SIZE, tiny.clip.IMAGE, tiny.synchformer.SIZE = tiny.CLIP, tiny.IMAGE, tiny.SYNCHFORMER
encode = encoders.TorchEncoders.encode_frames
def slow(self, frames, sequence):
    found = encode(self, frames, sequence)
    time.sleep({seconds})
    with open({log!r}, "a") as file:
        file.write("x")
    return found
encoders.TorchEncoders.encode_frames = slow
extract.define_flags()
extract.app.run(extract.main, {argv!r})
"""


@pytest.mark.slow
def test_killed_while_it_encodes(folder, videos, codec, tmp_path):
    """SIGKILL in the middle of a part, with a worker that decodes: nothing twice, nothing lost."""
    many, log, out = tmp_path / "many", tmp_path / "log", tmp_path / "r"
    many.mkdir()
    for i in range(12):
        (many / f"{i:02d}.mp4").symlink_to(videos / f"{'abc'[i % 3]}.mp4")
    argv = ["extract", f"--videos={many}", f"--out={out}", "--duration=1.28", "--workers=2"]
    argv += [f"--encoders={folder}", f"--codec={codec}"]

    def command(seconds):
        code = COMMAND.format(tests=str(HELPERS), seconds=seconds, log=str(log), argv=argv)
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        return subprocess.Popen(
            [sys.executable, "-c", code],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    first = command(0.5)
    deadline = time.time() + 120
    while (not log.exists() or len(log.read_text()) < 3) and time.time() < deadline:
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    encoded = len(log.read_text())
    assert 3 <= encoded < 12 and not (out / "manifest.json").exists()
    second = command(0)
    output, errors = second.communicate(timeout=240)
    assert second.returncode == 0, errors
    assert output.splitlines()[-1].endswith("12 records, 0 clips left out")
    assert len(log.read_text()) <= 13  # the one that was killed before it was noted
    assert [record["id"] for record in RecordSource(out)] == [f"{i:02d}" for i in range(12)]
    assert not list(out.glob("*.journal")) and not list(out.glob(".*"))


def test_workers_need_no_weights(folder, videos, codec):
    """What workers are sent holds no network, and decodes the same frames."""
    encoders = load_encoders(folder)
    job = work.Job(SEQUENCE, encoders.frame_transforms(SEQUENCE), False, {"": 0}, None, None)
    sent = pickle.dumps(job)
    assert len(sent) < 2000
    (entry,) = pickle.loads(sent).read(extraction.Clip("a", videos / "a.mp4"))
    for fps, seen in sampled(videos / "a.mp4", encoders).items():
        np.testing.assert_array_equal(entry["frames"][fps], seen)
    assert set(entry) == {"id", "caption", "text_row", "sound", "frames"}

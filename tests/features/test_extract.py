import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from commands import run_command

from vcm_jax.claim import ClaimError
from vcm_jax.codec import fit_linear_codec, load_codec
from vcm_jax.features import extract as extraction
from vcm_jax.features import shards
from vcm_jax.features.encoders import WeightsFreeEncoders
from vcm_jax.features.extract import ExtractError, encode_video, extract
from vcm_jax.media.read import read_audio
from vcm_jax.media.write import write_mp4, write_sound
from vcm_jax.records.schema import RecordError
from vcm_jax.records.sequence import SequenceConfig
from vcm_jax.records.source import RecordSource

RATE, SECONDS = 16_000, 0.8
SMALL = dict(duration=SECONDS, clip_dim=8, sync_dim=12, text_dim=6)


def noise(seed: int, seconds: float = SECONDS) -> np.ndarray:
    rng = np.random.default_rng(seed)
    envelope = np.exp(-np.arange(round(seconds * RATE)) / rng.uniform(500, 5000))
    return (0.3 * envelope * rng.standard_normal(len(envelope))).astype(np.float32)


def write_clip(path, seed: int, seconds: float = SECONDS, audio="noise"):
    frames = np.random.default_rng(seed).integers(0, 255, (round(25 * seconds), 16, 24, 3))
    sound = noise(seed, seconds) if isinstance(audio, str) else audio
    write_mp4(path, frames.astype(np.uint8), 25, sound, RATE)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Five good clips, one of them in a subfolder, and five bad ones, with captions."""
    folder = tmp_path_factory.mktemp("videos")
    for i, name in enumerate(["a", "-b_01", "c.1", "sub dir/d", "e"]):
        write_clip(folder / f"{name}.mp4", i)
    write_clip(folder / "mute.mp4", 5, audio=None)
    write_clip(folder / "silent.mp4", 6, audio=np.zeros(round(SECONDS * RATE)))
    write_clip(folder / "short.mp4", 7, seconds=0.68)
    (folder / "garbage.mp4").write_bytes(b"this is not a video" * 100)
    write_clip(folder / "uncaptioned.mp4", 8)
    names = ["e", "a", "-b_01", "mute", "c.1", "silent", "sub dir/d.mp4", "short", "garbage"]
    rows = [f"{name}\tthe caption of {name}" for name in names + ["missing", "a"]]
    text = "\r\n".join(["id\tcaption", *rows]) + "\r\n"
    (folder / "captions.tsv").write_bytes(text.encode())
    return folder


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(extraction, "CLIPS_PER_SHARD", 4)


@pytest.fixture(scope="module")
def whole(videos, tmp_path_factory):
    """A run without incident."""
    out = tmp_path_factory.mktemp("whole") / "records"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extraction, "CLIPS_PER_SHARD", 4)
        manifest = extract(out, videos=videos, captions=videos / "captions.tsv", **SMALL)
    return out, manifest


def test_records_hold_the_clips_in_order(videos, whole):
    out, manifest = whole
    source = RecordSource(out)
    assert source.manifest == manifest and len(source) == manifest.num_records == 5
    ids = ["e", "a", "-b_01", "c.1", "sub dir/d.mp4"]
    assert [source[i]["id"] for i in range(5)] == ids
    record = source[1]
    assert record["caption"] == "the caption of a"
    sequence, encoders = SequenceConfig(duration=SECONDS), WeightsFreeEncoders(8, 12, 6)
    clip, sync = encode_video(videos / "a.mp4", sequence, encoders)
    codec = load_codec(out / "codec")
    mean, _ = codec.encode(read_audio(videos / "a.mp4", RATE, sequence.num_samples))
    np.testing.assert_array_equal(record["clip"], clip.astype(np.float16))
    np.testing.assert_array_equal(record["sync"], sync.astype(np.float16))
    text = encoders.encode_text("the caption of a", sequence)
    np.testing.assert_array_equal(record["text"], text.astype(np.float16))
    np.testing.assert_array_equal(record["latent_mean"], mean)
    assert not record["latent_std"].any()


def test_manifest(whole):
    out, manifest = whole
    source = RecordSource(out)
    assert manifest.sequence == SequenceConfig(duration=SECONDS) and manifest.has_video
    assert manifest.encoders == WeightsFreeEncoders(8, 12, 6).spec()
    assert manifest.codec == {
        "name": "linear",
        "fingerprint": load_codec(out / "codec").fingerprint,
        "latent_dim": 20,
    }
    latents = np.concatenate([source[i]["latent_mean"] for i in range(5)])
    np.testing.assert_allclose(manifest.latent_mean, latents.mean(0), atol=1e-4)
    np.testing.assert_allclose(manifest.latent_std, latents.std(0), rtol=1e-4)
    for name, field in manifest.fields.items():
        assert list(source[0][name].shape) == field["shape"]
    assert source.empty_text.shape == (77, 6)


def test_what_is_left_out_is_listed(whole):
    out, manifest = whole
    lines = (out / "failures.tsv").read_text().splitlines()
    assert lines[0] == "id\treason" and manifest.num_failures == len(lines) - 1 == 6
    reasons = dict(line.split("\t") for line in lines[1:])
    for clip_id, reason in {
        "missing": "no such file in",
        "a": "duplicate id",
        "mute": "mute.mp4: no audio stream",
        "silent": "silent.mp4: digital silence",
        "short": "short.mp4: 0.68 s of sound, shorter than the 0.8 s needed",
        "garbage": "garbage.mp4: unreadable",
    }.items():
        assert reason in reasons[clip_id]


def test_an_interrupted_run_resumes(videos, whole, tmp_path, monkeypatch):
    run = lambda: extract(tmp_path / "r", videos=videos, captions=videos / "captions.tsv", **SMALL)
    finish_shard = shards.finish_shard

    def stop_at_the_second(out, number, *args):
        if number == 1:
            (out / "part-00001.array_record").write_bytes(b"half")  # the worst moment
            raise KeyboardInterrupt
        finish_shard(out, number, *args)

    monkeypatch.setattr(shards, "finish_shard", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run()
    with pytest.raises(RecordError, match="no manifest.json"):
        RecordSource(tmp_path / "r")
    first = tmp_path / "r" / "part-00000.array_record"
    before = first.stat().st_mtime_ns
    monkeypatch.setattr(shards, "finish_shard", finish_shard)
    assert run() == whole[1]
    assert first.stat().st_mtime_ns == before
    assert [r["id"] for r in RecordSource(tmp_path / "r")] == [
        r["id"] for r in RecordSource(whole[0])
    ]
    assert not list((tmp_path / "r").glob(".*"))


def test_shards_make_the_same_records(videos, whole, tmp_path, capsys):
    arguments = dict(videos=videos, captions=videos / "captions.tsv", **SMALL)
    assert extract(tmp_path, shard=(1, 3), **arguments) is None
    assert "share 1/3 is done, 2 of 3 shards are not" in capsys.readouterr().out
    assert extract(tmp_path, shard=(0, 3), **arguments) is None
    assert extract(tmp_path, shard=(2, 3), **arguments) == whole[1]
    with pytest.raises(ExtractError, match="--shard=3/3"):
        extract(tmp_path, shard=(3, 3), **arguments)


def test_complete_or_other_records_are_not_touched(videos, whole, tmp_path, capsys):
    out, manifest = whole
    captions = videos / "captions.tsv"
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert extract(out, videos=videos, captions=captions, **SMALL) == manifest
    assert "already complete" in capsys.readouterr().out
    for change, reason in (
        ({"duration": 0.7}, "sequence"),
        ({"sync_dim": 13}, "encoders"),
        ({"captions": None}, "clips"),
    ):
        with pytest.raises(ClaimError, match=f"other settings .*{reason}"):
            extract(out, **dict(videos=videos, captions=captions, **SMALL) | change)
    fit_linear_codec([noise(9)]).save(tmp_path / "codec")
    with pytest.raises(ExtractError, match="is not the codec in"):
        extract(out, videos=videos, captions=captions, codec=tmp_path / "codec", **SMALL)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_sounds_make_text_audio_records(tmp_path, whole):
    sounds = tmp_path / "sounds"
    (sounds / "Music Loops").mkdir(parents=True)
    write_sound(sounds / "Music Loops" / "Cave [1].wav", noise(0, 0.3), RATE)
    write_sound(sounds / "long.wav", noise(1, 2.0), RATE)
    write_sound(sounds / "silent.wav", np.zeros(8000), RATE)
    captions = tmp_path / "captions.tsv"
    captions.write_text(
        'year\tcaption\tid\n2020\t"big" cave\tMusic Loops/Cave [1].wav\n'
        "2021\tsilence\tsilent\n2022\t\tlong\n"
    )
    codec = whole[0] / "codec"
    manifest = extract(tmp_path / "r", sounds=sounds, captions=captions, codec=codec, **SMALL)
    assert not manifest.has_video and set(manifest.fields) == {"latent_mean", "latent_std", "text"}
    source = RecordSource(tmp_path / "r")
    assert [r["id"] for r in source] == ["Music Loops/Cave [1].wav", "long"]
    assert [r["caption"] for r in source] == ['"big" cave', ""]
    assert "clip" not in source[0] and "sync" not in source[0]
    padded = np.zeros(SequenceConfig(duration=SECONDS).num_samples, np.float32)
    sound = read_audio(sounds / "Music Loops" / "Cave [1].wav", RATE)
    padded[: len(sound)] = sound
    np.testing.assert_array_equal(source[0]["latent_mean"], load_codec(codec).encode(padded)[0])
    assert load_codec(tmp_path / "r" / "codec").fingerprint == load_codec(codec).fingerprint


def test_nothing_usable_leaves_nothing_that_looks_whole(videos, whole, tmp_path):
    table = tmp_path / "list.tsv"
    table.write_text("id\tcaption\nmute\t\nsilent\t\nmute\t\n")
    run = lambda **more: extract(tmp_path / "r", videos=videos, captions=table, **SMALL | more)
    with pytest.raises(ExtractError, match="none of 2 clips has a usable sound.*no audio stream"):
        run()
    with pytest.raises(ExtractError, match="none of 3 clips could be used.*duplicate"):
        run(codec=whole[0] / "codec")
    with pytest.raises(RecordError):
        RecordSource(tmp_path / "r")
    table.write_text("id\tcaption\na\t\n")  # the list is corrected
    assert run(codec=whole[0] / "codec").num_records == 1
    table.write_text("id\tcaption\nnothing\t\n")
    with pytest.raises(ExtractError, match="none of 1 rows"):
        run()
    with pytest.raises(ExtractError, match="give one of --videos and --sounds"):
        extract(tmp_path / "r", videos=videos, sounds=videos)


def test_features_too_large_for_float16_fail_their_clip(videos, tmp_path, monkeypatch):
    encode_frames = WeightsFreeEncoders.encode_frames

    def encode(self, frames, sequence):
        clip, sync = encode_frames(self, frames, sequence)
        return clip, sync * (1e6 if encode.calls.pop() else 1)

    encode.calls = [True, False, False, False, False]
    monkeypatch.setattr(WeightsFreeEncoders, "encode_frames", encode)
    out = tmp_path / "r"
    manifest = extract(out, videos=videos, captions=videos / "captions.tsv", **SMALL)
    assert manifest.num_records == 4
    assert "sub dir/d.mp4: sync is not finite as float16" in (out / "failures.tsv").read_text()


def command(*arguments):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    line = [sys.executable, "-m", "vcm_jax.features.extract", *map(str, arguments)]
    return subprocess.Popen(
        line, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_command_ends_with_one_line(videos, tmp_path):
    bad = command(f"--videos={tmp_path}", f"--out={tmp_path / 'r'}")
    out, err = bad.communicate(timeout=120)
    assert bad.returncode == 1 and not (tmp_path / "r").exists()
    assert err.splitlines()[-1].startswith(f"error: {tmp_path}: no files") and "Trace" not in err


@pytest.mark.slow
def test_killed_with_several_workers(videos, tmp_path):
    """After SIGKILL between two shards the next run finishes with the same records."""
    many = tmp_path / "many"
    many.mkdir()
    for i in range(600):
        (many / f"{i:03d}.mp4").symlink_to(videos / f"{'ae'[i % 2]}.mp4")
    arguments = [f"--videos={many}", f"--out={tmp_path / 'r'}", f"--duration={SECONDS}"]
    arguments += ["--clip_dim=8", "--sync_dim=12", "--text_dim=6", "--workers=2"]
    first = command(*arguments)
    deadline = time.time() + 120
    while not (tmp_path / "r" / "part-00000.json").exists() and time.time() < deadline:
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()  # returns only when the workers have closed the pipe, too
    assert not (tmp_path / "r" / "manifest.json").exists()
    second = command(*arguments)
    out, err = second.communicate(timeout=120)
    assert second.returncode == 0, err
    assert out.splitlines()[-1].endswith("600 records, 0 clips left out")
    source = RecordSource(tmp_path / "r")
    assert [record["id"] for record in source] == [f"{i:03d}" for i in range(600)]
    assert json.loads((tmp_path / "r" / "part-00002.json").read_text())["records"] == 88


def test_a_folder_of_an_earlier_version_resumes(videos, whole, tmp_path):
    """Its settings have other names: pieces for segments, chunk for clips_per_shard."""
    shutil.copytree(whole[0], tmp_path / "r")
    path = tmp_path / "r" / "settings.json"
    settings = json.loads(path.read_text())
    settings["pieces"], settings["chunk"] = (
        settings.pop("segments"),
        settings.pop("clips_per_shard"),
    )
    path.write_text(json.dumps(settings))
    for file in (tmp_path / "r").glob("part-*.json"):  # and the hash of the records another name
        content = json.loads(file.read_text())
        content["hash"] = content.pop("digest")
        file.write_text(json.dumps(content))
    (tmp_path / "r" / "manifest.json").unlink()
    before = (tmp_path / "r" / "part-00000.array_record").stat().st_mtime_ns
    arguments = dict(videos=videos, captions=videos / "captions.tsv", **SMALL)
    assert extract(tmp_path / "r", **arguments) == whole[1]
    assert (tmp_path / "r" / "part-00000.array_record").stat().st_mtime_ns == before


@pytest.mark.parametrize("text", ["x", "[]", "{}", '{"records": 1}'])
def test_a_damaged_summary_is_one_line(videos, whole, tmp_path, text):
    shutil.copytree(whole[0], tmp_path / "r")
    (tmp_path / "r" / "manifest.json").unlink()
    path = tmp_path / "r" / "part-00001.json"
    arguments = dict(videos=videos, captions=videos / "captions.tsv", **SMALL)
    content = path.read_text()
    for damaged in (
        text,
        content.replace("0.", "1.", 1),
        content.replace("records", "recordz"),
        content.replace("digest", "eigest"),
    ):
        path.write_text(damaged)
        with pytest.raises(ValueError, match="part-00001.json"):
            extract(tmp_path / "r", **arguments)
    path.unlink()
    assert extract(tmp_path / "r", **arguments) == whole[1]


def test_the_end_says_what_the_validator_would_object_to(tmp_path):
    """Still pictures are a warning, equal sounds under several ids an error; it decides nothing."""
    for i in range(3):
        write_clip(tmp_path / f"videos/{i}.mp4", i, audio=noise(min(i, 1)))
    still = np.full((20, 16, 24, 3), 99, np.uint8)
    write_mp4(tmp_path / "videos/still.mp4", still, 25, noise(3), RATE)
    flags = [f"--{name}={value}" for name, value in SMALL.items()]
    out = tmp_path / "records"
    videos = f"--videos={tmp_path / 'videos'}"
    done = run_command(extraction, videos, f"--out={out}", "--workers=1", *flags)
    assert done.code == 0, done.err
    assert done.out.splitlines() == [
        "error: clips with the same sound under other ids (1), for example 1 = 2",
        "warning: no captions (4), for example 0, 1, 2, still",
        "warning: still picture (sync features never change) (1), for example still",
        "warning: still picture (clip features never change) (1), for example still",
        f"{out}: 4 records, 0 clips left out",
    ]

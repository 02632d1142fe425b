"""One bad clip never costs another, and two processes never share a folder."""

import dataclasses
import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import run_command

from vcm_jax.claim import ClaimError
from vcm_jax.codec import fit_linear_codec
from vcm_jax.features import extract as extraction
from vcm_jax.features import records_codec, work
from vcm_jax.features.encoders import WeightsFreeEncoders
from vcm_jax.features.extract import ExtractError, extract
from vcm_jax.features.shards import Journal
from vcm_jax.media.clips import list_clips
from vcm_jax.media.read import read_audio, read_frames
from vcm_jax.media.write import write_mp4, write_sound
from vcm_jax.records.manifest import read_manifest
from vcm_jax.records.sequence import SequenceConfig
from vcm_jax.records.source import RecordSource

RATE, SECONDS = 16_000, 0.8
SMALL = dict(duration=SECONDS, clip_dim=8, sync_dim=12, text_dim=6)
SEQUENCE = SequenceConfig(duration=SECONDS)


def noise(seed: int, seconds: float = SECONDS) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(round(seconds * RATE))).astype("f4")


def write_clip(path, seed: int, seconds: float = SECONDS, level: int = 255):
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, level, (round(25 * seconds), 16, 24, 3)).astype(np.uint8)
    write_mp4(path, frames, 25, noise(seed, seconds), RATE)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for i in range(4):
        write_clip(folder / f"{i}.mp4", i)
    return folder


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    folder = tmp_path_factory.mktemp("codec") / "codec"
    fit_linear_codec([noise(i) for i in range(3)]).save(folder)
    return folder


def ids(out):
    return [record["id"] for record in RecordSource(out)]


ERRORS = [RuntimeError("odd"), MemoryError(), IndexError("list"), UnicodeError(), KeyError("x")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("where", ["reading", "encoding"])
def test_any_error_leaves_one_clip_out(videos, codec, tmp_path, monkeypatch, error, where):
    if where == "reading":

        def fail(path, *args, **kwargs):
            if path.stem == "1":
                raise error
            return read_frames(path, *args, **kwargs)

        monkeypatch.setattr(work, "read_frames", fail)
    else:
        encode, calls = WeightsFreeEncoders.encode_frames, iter(range(9))

        def fail(self, frames, sequence):
            if next(calls) == 1:
                raise error
            return encode(self, frames, sequence)

        monkeypatch.setattr(WeightsFreeEncoders, "encode_frames", fail)
    extract(tmp_path / "r", videos=videos, codec=codec, **SMALL)
    assert ids(tmp_path / "r") == ["0", "2", "3"]
    (line,) = (tmp_path / "r" / "failures.tsv").read_text().splitlines()[1:]
    assert line.startswith("1\t") and f"1.mp4: {type(error).__name__}" in line


def test_a_full_device_ends_the_run(videos, codec, tmp_path, monkeypatch):
    def full(self, sound):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(type(extraction.load_codec(codec)), "encode", full)
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        extract(tmp_path / "r", videos=videos, codec=codec, **SMALL)


def test_no_error_of_a_clip_keeps_the_codec_from_being_fitted(videos, tmp_path, monkeypatch):
    usable = ["2"]

    def fail(path, *args, **kwargs):
        if path.stem not in usable:
            raise RuntimeError("Frame does not match AudioResampler setup.")
        return work.read_sound(path, *args, **kwargs)

    monkeypatch.setattr(records_codec, "read_sound", fail)
    assert extract(tmp_path / "r", videos=videos, **SMALL).num_records == 4
    usable.clear()
    with pytest.raises(ExtractError, match="none of 4 clips has a usable sound, the first: .*mp4"):
        extract(tmp_path / "s", videos=videos, **SMALL)


def deadly(frame: np.ndarray) -> np.ndarray:
    """A transform at which a process dies when it sees a dark frame."""
    if frame.max() < 100:
        os.kill(os.getpid(), signal.SIGKILL)
    return frame[:1, :1].astype(np.float32)


@dataclasses.dataclass
class Encoder:
    on_device: bool = False

    def encode_frames(self, frames, sequence):
        return np.zeros((1, 1)), np.zeros((1, 1))


def test_a_clip_at_which_a_worker_dies_is_left_out(codec, tmp_path):
    for i in range(6):
        write_clip(tmp_path / f"{i}.mp4", i, level=20 if i == 3 else 255)
    clips, _ = list_clips(tmp_path)
    job = work.Job(SEQUENCE, {25: deadly}, False, {"": 0}, Encoder(), extraction.load_codec(codec))
    found = [results[0] for results in work.run(job, codec, clips, 2)]
    assert [clip_id for clip_id, _, _ in found] == [clip.id for clip in clips]
    assert [clip_id for clip_id, packed, _ in found if packed is None] == ["3"]
    assert found[3][2].endswith("3.mp4: its worker process died")


def test_workers_that_always_die_end_the_run(codec, tmp_path, monkeypatch):
    monkeypatch.setattr(work, "_DEATHS", 2)
    for i in range(3):
        write_clip(tmp_path / f"{i}.mp4", i, level=20)
    clips, _ = list_clips(tmp_path)
    job = work.Job(SEQUENCE, {25: deadly}, False, {"": 0}, Encoder(), extraction.load_codec(codec))
    with pytest.raises(ExtractError, match="2 worker processes in a row died"):
        list(work.run(job, codec, clips, 2))


@pytest.fixture(scope="module")
def long_clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long")
    write_clip(folder / "long.mp4", 7, seconds=3.0)
    return folder


def test_start_shifts_picture_and_sound(long_clip, codec, tmp_path):
    table = tmp_path / "list.tsv"
    table.write_text("id\tcaption\tfile\tstart\na\t\tlong\t\nb\t\tlong\t1.4\n")
    extract(tmp_path / "r", videos=long_clip, captions=table, codec=codec, **SMALL)
    first, second = RecordSource(tmp_path / "r")
    encoders, path = WeightsFreeEncoders(8, 12, 6), long_clip / "long.mp4"
    for record, start in ((first, 0.0), (second, 1.4)):
        frames = read_frames(path, encoders.frame_transforms(SEQUENCE), 3.0)
        frames = {fps: f[round(start * fps) :][: round(SECONDS * fps)] for fps, f in frames.items()}
        sound = read_audio(path, RATE)[round(start * RATE) :][: SEQUENCE.num_samples]
        clip, sync = encoders.encode_frames(frames, SEQUENCE)
        np.testing.assert_allclose(record["sync"], sync, atol=0.01)
        mean, _ = extraction.load_codec(codec).encode(sound)
        np.testing.assert_allclose(record["latent_mean"], mean, atol=0.01)
    assert abs(first["sync"] - second["sync"]).max() > 0.1


@pytest.mark.parametrize("kind", ["videos", "sounds"])
def test_starts_that_cannot_be_used(long_clip, codec, tmp_path, kind):
    table = tmp_path / "list.tsv"
    starts = ["1", "-1", "inf", "nan", "1e6", "3.5", "x"] + (["2.9"] if kind == "videos" else [])
    rows = [f"{i}\t\tlong\t{start}" for i, start in enumerate(starts)]
    table.write_text("\n".join(["id\tcaption\tfile\tstart", *rows]))
    folder = {kind: long_clip}
    manifest = extract(tmp_path / "r", **folder, captions=table, codec=codec, **SMALL)
    assert ids(tmp_path / "r") == ["0"] and manifest.num_failures == len(rows) - 1
    reasons = (tmp_path / "r" / "failures.tsv").read_text()
    assert "start 1e+06 s is past the end" in reasons and "start '-1' is not a number" in reasons


HOLDER = """
import sys, time
from vcm_jax.claim import hold
with hold(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_extraction_is_refused_while_the_first_one_works(videos, codec, tmp_path):
    arguments = [f"--videos={videos}", f"--out={tmp_path / 'r'}", f"--codec={codec}"]
    first = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path / "r"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert first.stdout.readline() == "held\n"
        done = run_command(extraction, *arguments, "--duration=0.8", "--workers=1")
        assert done.code == 1 and f"process {first.pid} on" in done.err
        assert not list((tmp_path / "r").glob("part-*"))
        with pytest.raises(ClaimError):
            extract(tmp_path / "r", videos=videos, codec=codec, **SMALL)
    finally:
        first.kill()
        first.communicate()
    assert extract(tmp_path / "r", videos=videos, codec=codec, **SMALL).num_records == 4


def test_a_full_disk_is_an_error_with_the_files_name(tmp_path):
    journal = Journal(tmp_path, 0)
    journal._path = Path("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as caught:
        journal.append([("a", b"record", np.zeros(1))])
    assert caught.value.filename == "/dev/full" and not journal.entries


def test_the_exit_code_says_that_clips_were_left_out(videos, codec, tmp_path):
    run = functools.partial(
        run_command, extraction, f"--codec={codec}", "--duration=0.8", "--workers=1"
    )
    assert run(f"--videos={videos}", f"--out={tmp_path / 'r'}").code == 0
    table = tmp_path / "list.tsv"
    table.write_text("id\tcaption\n0\t\n../1\t\n")
    arguments = (f"--videos={videos}", f"--out={tmp_path / 's'}", f"--captions={table}")
    done = run(*arguments)
    assert done.code == 3 and "1 records, 1 clips left out (listed in" in done.out
    assert run(*arguments).code == 3  # already complete


def test_names_that_are_no_utf8(videos, codec, tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    (folder / os.fsdecode(b"\xe9.mp4")).symlink_to(videos / "0.mp4")
    (folder / os.fsdecode(b"\xea.mp4")).write_bytes(b"garbage")
    extract(tmp_path / "r", videos=folder, codec=codec, **SMALL)
    assert ids(tmp_path / "r") == [r"\xe9"]
    assert r"caf\xe9/\xea.mp4: unreadable" in (tmp_path / "r" / "failures.tsv").read_text()


def test_segments_begin_at_start(codec, tmp_path):
    write_sound(tmp_path / "a.wav", noise(0, 2.0), RATE)
    table = tmp_path / "list.tsv"
    table.write_text("id\tcaption\tfile\tstart\nx\t\ta\t0.4\ny\t\ta\t5\n")
    extract(tmp_path / "r", sounds=tmp_path, captions=table, codec=codec, segments=True, **SMALL)
    assert ids(tmp_path / "r") == ["x_0", "x_1"]
    assert read_manifest(tmp_path / "r").num_failures == 1

"""A set of records to sounds: the same for any batch, shard and interruption."""

import dataclasses
import errno

import jax
import numpy as np
import pytest
import soundfile
from commands import run_command
from small_runs import extract_test_records

from vcm_jax import generate as command
from vcm_jax.claim import ClaimError, hold
from vcm_jax.generation import finish
from vcm_jax.generation.clips import Request, encode_request, generate
from vcm_jax.generation.records import RecordsError, generate_records
from vcm_jax.generation.run import load_run
from vcm_jax.records.schema import RecordError
from vcm_jax.records.source import RecordSource
from vcm_jax.sampling import uniform_times

TIMES = uniform_times(1)


@pytest.fixture(scope="module")
def given(world):
    """A run, and the records of the test clips."""
    return load_run(world / "run"), RecordSource(extract_test_records(world, "test_records"))


def read(folder, suffix="wav"):
    return {path.stem: soundfile.read(path) for path in sorted(folder.glob(f"*.{suffix}"))}


def test_neither_batch_nor_shard_nor_interruption_changes_a_sound(given, world, tmp_path):
    run, source = given
    done = generate_records(run, source, tmp_path / "one", TIMES, batch_size=1)
    assert (done.written, done.kept) == (3, 0)
    whole = read(tmp_path / "one")
    assert list(whole) == ["000000", "000001", "000002"]
    # conftest.py makes eight devices: batches of one and of three are both filled up to eight.
    assert jax.local_device_count() == 8

    for part in (0, 1):
        generate_records(
            run, source, tmp_path / "two", TIMES, batch_size=16, suffix="flac", part=part, parts=2
        )
    for clip, (sound, rate) in read(tmp_path / "two", "flac").items():
        assert rate == whole[clip][1] == 16_000 and len(sound) == round(1.28 * rate)
        np.testing.assert_allclose(sound, whole[clip][0], atol=1e-3)

    # The same sounds as from the videos themselves, by id.
    items = [
        encode_request(
            Request(clip, world / "data/test" / f"{clip}.mp4", source[i]["caption"]), run
        )
        for i, clip in enumerate(whole)
    ]
    for item, sound in generate(run, items, TIMES, batch_size=2):
        # Records keep features as float16.
        wanted = whole[item.request.id][0]
        assert np.std(sound - wanted) < 0.05 * np.std(wanted) > 0

    (tmp_path / "one/000001.wav").unlink()
    kept = (tmp_path / "one/000000.wav").stat().st_mtime_ns
    done = generate_records(run, source, tmp_path / "one", TIMES, batch_size=4)
    assert (done.written, done.kept) == (1, 2)
    np.testing.assert_array_equal(read(tmp_path / "one")["000001"][0], whole["000001"][0])
    assert (tmp_path / "one/000000.wav").stat().st_mtime_ns == kept
    assert not list((tmp_path / "one").glob(".*")), "no temporary file is left"


def test_what_cannot_go_into_the_folder(given, tmp_path):
    run, source = given
    generate_records(run, source, tmp_path / "out", TIMES, batch_size=8)
    for changes, message in (
        (dict(seed=1), "other settings .seed 0, not 1"),
        (dict(times=uniform_times(2)), "other settings .times "),
    ):
        with pytest.raises(ClaimError, match=message):
            generate_records(run, source, tmp_path / "out", **dict(times=TIMES) | changes)
    other = dataclasses.replace(
        run, variables=jax.tree.map(lambda a: a + np.float32(1), run.variables)
    )
    with pytest.raises(ClaimError, match="other settings .weights "):
        generate_records(other, source, tmp_path / "out", TIMES)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("x")
    with pytest.raises(ClaimError, match="holds other files"):
        generate_records(run, source, tmp_path / "full", TIMES)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ClaimError, match="is a file, not a folder"):
        generate_records(run, source, tmp_path / "file", TIMES)


def test_two_processes_do_not_make_the_same_sounds(given, tmp_path):
    run, source = given
    with hold(tmp_path / "out", (0, 2)):
        with pytest.raises(ClaimError, match="works in this folder"):
            generate_records(run, source, tmp_path / "out", TIMES)
        done = generate_records(run, source, tmp_path / "out", TIMES, part=1, parts=2)
    assert done.written == 1 and len(read(tmp_path / "out")) == 1


def test_one_bad_clip_costs_no_other(given, tmp_path, monkeypatch):
    run, source = given
    damaged = Changed(source, damaged=1)
    write = finish.write_sound

    def fail(path, *args):
        if path.stem == "000002":
            raise TypeError("a bug")
        write(path, *args)

    monkeypatch.setattr(finish, "write_sound", fail)
    done = generate_records(run, damaged, tmp_path / "out", TIMES)
    assert list(read(tmp_path / "out")) == ["000000"] and done.written == 1
    reasons = dict(done.left_out)
    assert "damaged" in reasons["record 1"] and "TypeError: a bug" in reasons["000002"]

    def full(path, *args):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(finish, "write_sound", full)
    with pytest.raises(OSError, match="No space left"):  # no later clip could be written
        generate_records(run, source, tmp_path / "out", TIMES)
    monkeypatch.setattr(finish, "write_sound", write)
    done = generate_records(run, source, tmp_path / "out", TIMES)
    assert (done.written, done.kept, done.left_out) == (2, 1, [])


def test_the_command_on_records(given, world, tmp_path):
    arguments = [f"--workdir={world / 'run'}", f"--records={world / 'test_records'}"]
    done = run_command(command, *arguments, f"--out={tmp_path / 'v1.0'}", "--seed=-1")
    assert done.code == 0 and "3 written, 0 left out, 0 were there" in done.out
    assert len(read(tmp_path / "v1.0")) == 3
    for flags, message in (
        (["--prompt=x"], "leave out --prompt"),
        (["--shard=2/2"], "--shard=2/2: must be i/n"),
        (["--format=mp4"], "folder of sounds"),
    ):
        done = run_command(command, *arguments, f"--out={tmp_path / 'x'}", *flags)
        assert done.code == 1 and message in done.err and done.err.count("\n") == 1
    done = run_command(command, *arguments, f"--out={tmp_path / 'x.wav'}")
    assert done.code == 1 and "folder of sounds" in done.err and not (tmp_path / "x").exists()


class Changed:
    """A source with other ids or another manifest, or with a damaged record."""

    def __init__(self, source, ids=None, damaged=None, **manifest):
        self.source, self.ids, self.path, self.damaged = source, ids, source.path, damaged
        self.manifest = dataclasses.replace(source.manifest, **manifest)

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        if index == self.damaged:
            raise RecordError(f"record {index} is damaged")
        return self.source[index] | ({"id": self.ids[index]} if self.ids else {})


def test_records_that_do_not_fit(given, tmp_path):
    run, source = given
    spec = source.manifest.encoders | {"version": 99}
    with pytest.raises(RecordsError, match="not for this run: encoders"):
        generate_records(run, Changed(source, encoders=spec), tmp_path / "a", TIMES)
    assert not (tmp_path / "a").exists()
    for ids, message in (
        (["a", "../b", "c"], "'../b' does not name a file inside"),
        (["a", "/b", "c"], "'/b' does not name a file inside"),
        (["a", "b", "a.wav"], "the id a.wav occurs twice"),
        (["a", "b", "a"], "the id a occurs twice"),
    ):
        with pytest.raises(RecordsError, match=message):
            generate_records(run, Changed(source, ids), tmp_path / "b", TIMES)

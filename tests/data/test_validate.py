"""The validator on good records, and on each kind of bad ones."""

import dataclasses
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from commands import run_command

from vcm_jax.codec import LinearCodec, fit_linear_codec
from vcm_jax.data import checks
from vcm_jax.data import validate as validator
from vcm_jax.data.checks import check_leaks
from vcm_jax.data.validate import validate
from vcm_jax.features.extract import extract
from vcm_jax.media.write import write_mp4
from vcm_jax.records.manifest import read_manifest, write_manifest
from vcm_jax.records.schema import RecordError, serialize, write_shard
from vcm_jax.records.source import RecordSource
from vcm_jax.records.survey import Survey

RATE, SECONDS = 16_000, 0.8
SMALL = dict(duration=SECONDS, clip_dim=8, sync_dim=12, text_dim=6)

OPTIONS = {"positional": "the records folder"}


def write_clip(path, seed: int, still: bool = False):
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 255, (20, 16, 24, 3)).astype(np.uint8)
    if still:
        frames[:] = frames[0]
    times = np.arange(round(SECONDS * RATE)) / RATE
    bursts = np.exp(-10 * abs(times - rng.uniform(0.1, 0.7)))
    sound = 0.3 * bursts * rng.standard_normal(len(times))
    write_mp4(path, frames, 25, sound.astype(np.float32), RATE)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """(videos, captions, records) of six clips."""
    folder = tmp_path_factory.mktemp("good")
    rows = ["id\tcaption"]
    for i in range(6):
        write_clip(folder / "videos" / f"abcdefghij{i}_{i:06d}.mp4", i)
        rows.append(f"abcdefghij{i}_{i:06d}\tcaption number {'abcdef'[i]}")
    (folder / "captions.tsv").write_text("\n".join(rows + ["gone\tx"]) + "\n")
    captions = folder / "captions.tsv"
    extract(folder / "records", videos=folder / "videos", captions=captions, **SMALL)
    return folder / "videos", captions, folder / "records"


def rewrite(source_folder, folder, change):
    """A copy of records with `change(index, record)` (None: left out) applied."""
    shutil.copytree(source_folder, folder)
    source = RecordSource(source_folder)
    changed = [change(i, dict(source[i])) for i in range(len(source))]
    packed = [serialize(record) for record in changed if record]
    path = folder / "part-00000.array_record"
    path.unlink()
    write_shard(path, packed)
    shard = {"name": path.name, "records": len(packed), "bytes": path.stat().st_size}
    changes = {"shards": [shard], "num_records": len(packed), "text_table": None}
    write_manifest(folder, dataclasses.replace(read_manifest(folder), **changes))
    return folder


def errors(findings):
    return [str(finding) for finding in findings if finding.level == "error"]


def test_good_records_are_fit(good, tmp_path, monkeypatch):
    # Inverting spectrograms takes long to compile, and is tested elsewhere.
    monkeypatch.setattr(LinearCodec, "decode", lambda self, latents: np.zeros(RATE, np.float32))
    videos, captions, folder = good
    page = tmp_path / "page.html"
    assert validate(folder, videos=videos, captions=captions, page=page) == []
    text = page.read_text()
    assert "fit to train on" in text and text.count("<audio") == 4 and "not fit" not in text


def test_values_ids_and_statistics(good, tmp_path):
    def change(index, record):
        if index == 1:
            record["latent_std"] = record["latent_std"] - 1
        if index == 2:
            record["sync"] = np.zeros_like(record["sync"])
        if index == 3:
            record["latent_mean"] = np.zeros_like(record["latent_mean"])
        if index == 4:
            record["clip"] = record["clip"] + 2000
        if index == 5:
            record["id"] = "abcdefghij0_000000"
        return record

    found = "\n".join(map(str, validate(rewrite(good[2], tmp_path / "bad", change))))
    for reason in (
        "latent_std is negative (1), for example abcdefghij1_000001",
        "warning: still picture (sync features never change) (1), for example abcdefghij2_000002",
        "error: sound that never changes (silence?) (1), for example abcdefghij3_000003",
        "clip exceeds 1000 (1), for example abcdefghij4_000004",
        "ids that occur twice (1), for example abcdefghij0_000000",
        "latent statistics in the manifest are off by",
    ):
        assert reason in found


def test_captions_that_are_shifted(good, tmp_path):
    videos, captions, folder = good
    source = RecordSource(folder)
    texts = [source[i]["caption"] for i in range(6)]
    shifted = rewrite(folder, tmp_path / "bad", lambda i, r: r | {"caption": texts[min(i + 1, 5)]})
    found = "\n".join(errors(validate(shifted, captions=captions)))
    assert "captions differ from the list; most are those of the row +1 from theirs (5)" in found
    assert "text features are not those of the caption (5)" in found
    lost = rewrite(folder, tmp_path / "lost", lambda i, r: None if i == 2 else r)
    found = "\n".join(errors(validate(lost, captions=captions)))
    assert "neither here nor in failures.tsv (1), for example abcdefghij2_000002" in found


def test_latents_of_another_file_and_still_pictures(good, tmp_path):
    _, captions, folder = good
    videos = tmp_path / "videos"
    for i in range(6):  # the first two have changed places
        write_clip(videos / f"abcdefghij{i}_{i:06d}.mp4", (1, 0, 2, 3, 4, 5)[i], still=i == 4)
    (videos / "abcdefghij5_000005.mp4").unlink()
    findings = validate(folder, videos=videos, captions=captions)
    found = "\n".join(map(str, findings))
    assert "latents are not those of the file (2)" in found
    assert "warning: still picture (1), for example abcdefghij4_000004" in found
    assert "warning: media files not found for records (1)" in found


def test_leaks(good, tmp_path):
    def change(index, record):
        names = ("abcdefghij0_000000", "abcdefghij1_000099", "x", "y", "z", "w")
        record["id"] = names[index]
        rng = np.random.default_rng(index)
        if index == 3:  # nearly the same
            noise = rng.standard_normal(record["latent_mean"].shape)
            record["latent_mean"] = record["latent_mean"] + 0.01 * noise
        if index > 3:
            record["latent_mean"] = rng.permutation(record["latent_mean"])
        return record

    test = rewrite(good[2], tmp_path / "test", change)
    found = "\n".join(map(str, validate(good[2], against=test)))
    assert "error: ids that are in the test set (1), for example abcdefghij0_000000" in found
    assert "warning: other seconds of a video that is in the test set (1)" in found
    assert "error: sounds that are in the test set (3)" in found
    assert "abcdefghij2_000002 = x" in found
    assert "(1), for example abcdefghij3_000003 ~ y (0.99" in found


def test_nothing_shared_is_no_leak():
    rows = np.eye(4, dtype=np.float16)

    def made(name, signatures):
        ids, hashes = [name + "0", name + "1"], [name.encode(), name.encode() * 2]
        return Survey(ids, ["", ""], hashes, signatures, {}, [], {}, np.zeros(0))

    one, two = made("a", rows[:2]), made("b", rows[2:])
    assert check_leaks(one, two) == []


@pytest.fixture
def copied(good, tmp_path):
    shutil.copytree(good[2], tmp_path / "copied")
    return tmp_path / "copied"


def rewrite_json(path, **changes):
    """Edits a JSON file as a user might, without its hash."""
    content = json.loads(path.read_text()) | changes
    content.pop("hash", None)
    path.write_text(json.dumps(content))


def test_an_unfit_empty_text(copied):
    path = copied / "empty_text.npy"
    whole = np.load(path)
    for content, reason in (
        (None, "missing or damaged .*No such file"),
        (b"garbage", "missing or damaged"),
        (np.where(whole == whole, np.nan, whole), "the features are not finite"),
        (whole[:5], r"float32 \(5, 6\), needed is float32 \(77, 6\)"),
        (whole.astype(np.float64), "float64"),
        (whole + 1, "not the features that were written"),
    ):
        path.unlink(missing_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            np.save(path, content)
        with pytest.raises(RecordError, match=f"empty_text.npy: {reason}"):
            _ = RecordSource(copied).empty_text
        (found,) = (e for e in errors(validate(copied)) if "empty_text.npy" in e)
        assert "\n" not in found
    rewrite_json(copied / "manifest.json", empty_text=None)  # of an earlier version
    assert (
        "error: text features are not those of the caption (1), for example (the empty text)"
        in (errors(validate(copied)))
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"latent_mean": [float("nan")] * 20},
        {"latent_std": [float("inf")] * 20},
        {"latent_std": [-1.0] * 20},
        {"latent_mean": [0.0] * 19},
        {"latent_mean": "zero"},
        {"num_records": "six"},
        {"num_records": True},
        {"shards": [{"name": "../part.array_record", "records": 6, "bytes": 1}]},
        {"shards": 5},
        {"shards": [{"name": 5, "records": 6, "bytes": 1}]},
        {"codec": None},
        {"codec": {"latent_dim": "20"}},
        {"fields": {"clip": {"shape": ["x"], "dtype": "float16"}}},
        {"fields": {"clip": {"shape": [1], "dtype": "strange"}}},
        {"sequence": {"duration": 0.1}},
        {"sequence": {"duration": float("nan")}},
        {"text_table": {"rows": 6, "bytes": 5}},
        {"text_table": {"rows": 6, "bytes": 5, "hashes": "?"}},
        {"encoders": []},
        {"version": [2]},
    ],
    ids=str,
)
def test_a_manifest_that_no_extraction_writes(copied, changes):
    rewrite_json(copied / "manifest.json", **changes)
    found = errors(validate(copied))
    assert len(found) == 1 and str(copied) in found[0] and "\n" not in found[0]


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "null", '{"version": 2}', "\xff"])
def test_a_foreign_manifest(copied, text):
    (copied / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(RecordError, match="manifest.json: damaged"):
        RecordSource(copied)


def test_a_codec_that_is_not_the_records(copied):
    shutil.rmtree(copied / "codec")
    assert "not a codec folder" in errors(validate(copied))[0]
    rng = np.random.default_rng(0)
    fit_linear_codec([rng.standard_normal(40_960)]).save(copied / "codec")
    assert "not the codec of the manifest (fingerprint)" in errors(validate(copied))[0]


def test_any_error_of_a_media_file_is_a_finding(good, monkeypatch):
    videos, captions, folder = good

    def fail(path):
        raise RuntimeError("odd")

    monkeypatch.setattr(checks, "stream_offset", fail)
    found = "\n".join(errors(validate(folder, videos=videos, captions=captions)))
    assert "cannot be read again (6)" in found and "RuntimeError: odd" in found


def test_command_says_what_is_wrong_and_fails(good, tmp_path):
    cut = tmp_path / "cut"
    shutil.copytree(good[2], cut)
    shard = cut / "part-00000.array_record"
    shard.write_bytes(shard.read_bytes()[:-9])
    command = [sys.executable, "-m", "vcm_jax.data.validate", str(cut)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "part-00000.array_record: " in done.stdout
    assert "NOT fit to train on" in done.stdout and "Traceback" not in done.stderr


def test_videos_and_sounds_at_once_are_refused(tmp_path):
    with pytest.raises(ValueError, match="one of --videos and --sounds, not both"):
        validate(tmp_path, videos=tmp_path, sounds=tmp_path)


def test_a_page_that_cannot_be_written_is_no_success(good, tmp_path):
    records = good[2]
    assert run_command(validator, records, f"--page={tmp_path / 'v.html'}", **OPTIONS).code == 0
    (tmp_path / "file").write_text("")
    for page in (tmp_path / "file/v.html", tmp_path):
        done = run_command(validator, records, f"--page={page}", **OPTIONS)
        assert done.code == 74 and f"warning: {page}: not written" in done.out
        assert "fit to train on" in done.out

"""MMAudio's memory-mapped features to records: what comes out, and what is refused."""

import json
import re
import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest
from commands import run_command

from vcm_jax.cli import LEFT_OUT
from vcm_jax.codec.linear import LinearCodec
from vcm_jax.interop import import_features, import_torch
from vcm_jax.interop.import_features import FeatureError
from vcm_jax.records.schema import latent_statistics, latent_sums
from vcm_jax.records.source import RecordSource

DURATION = 0.8  # 25 latents, 6 clip rows, 8 sync rows
SHAPES = {
    "mean": (25, 4),
    "std": (25, 4),
    "clip_features": (6, 5),
    "sync_features": (8, 3),
    "text_features": (7, 6),
}
IDS = ["-b_2", "a", "c", "a", "a#2", "a"]


def write_memmaps(folder, arrays):
    """As tensordict writes them; bfloat16 and others by their own dtype."""
    folder.mkdir()
    meta = {"shape": [len(arrays["mean"])], "device": "cpu", "_type": "TensorDict"}
    for name, array in arrays.items():
        (folder / f"{name}.memmap").write_bytes(array.tobytes())
        dtype = f"torch.{array.dtype.name}"
        meta[name] = {"device": "cpu", "shape": list(array.shape), "dtype": dtype}
        meta[name]["is_nested"] = False
    (folder / "meta.json").write_text(json.dumps(meta))


def make_arrays(count, video=True):
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal((count, *shape)) for name, shape in SHAPES.items()}
    dtypes = {"clip_features": jnp.bfloat16, "text_features": np.float16, "std": jnp.bfloat16}
    arrays["std"] = abs(arrays["std"])
    return {
        name: array.astype(dtypes.get(name, np.float32))
        for name, array in arrays.items()
        if video or not name.startswith(("clip", "sync"))
    }


@pytest.fixture
def features(tmp_path):
    """(arrays, arguments of the command) of six clips with pictures."""
    arrays = make_arrays(len(IDS))
    write_memmaps(tmp_path / "memmaps", arrays)
    rows = [f"{name}\tthe {i}. label" for i, name in enumerate(IDS[:-1])]
    rows.append(IDS[-1] + '\t"so-called ""rain"""')
    (tmp_path / "clips.tsv").write_text("\n".join(["id\tlabel", *rows]) + "\n")
    LinearCodec(np.zeros(160), np.eye(4, 160), 1.0).save(tmp_path / "codec")
    np.save(tmp_path / "empty.npy", np.full(SHAPES["text_features"], 0.5))
    return arrays, {
        "folder": tmp_path / "memmaps",
        "tsv": tmp_path / "clips.tsv",
        "codec": tmp_path / "codec",
        "empty_text": tmp_path / "empty.npy",
        "duration": DURATION,
        "out": tmp_path / "records",
    }


def convert(args):
    options = [f"--{name}={value}" for name, value in args.items() if name != "folder"]
    arguments = ("features", args["folder"], *options)
    return run_command(import_torch, *arguments, positional=import_torch.POSITIONAL)


def test_records_hold_the_rows_in_their_order(features, monkeypatch):
    monkeypatch.setattr(import_features, "_SHARD", 4)
    arrays, args = features
    done = convert(args)
    assert (done.code, "6 records, 0 clips left out" in done.out) == (0, True)
    source = RecordSource(args["out"])
    assert [source[i]["id"] for i in range(6)] == ["-b_2", "a", "c", "a#3", "a#2", "a#4"]
    assert source[1]["caption"] == "the 1. label" and source[5]["caption"] == 'so-called "rain"'
    fields = dict(mean="latent_mean", std="latent_std", clip_features="clip", text_features="text")
    for name, field in (fields | {"sync_features": "sync"}).items():
        for i in range(6):
            stored = source[i][field]
            np.testing.assert_array_equal(stored, arrays[name][i].astype(stored.dtype), name)
    np.testing.assert_array_equal(source.empty_text, np.full((7, 6), 0.5, np.float32))
    source.check_statistics()
    manifest = source.manifest
    assert manifest.has_video and [shard["records"] for shard in manifest.shards] == [4, 2]
    assert manifest.sequence.sync_seq_len == 8 and manifest.sequence.text_seq_len == 7
    assert manifest.codec["latent_dim"] == 4 and (args["out"] / "codec/codec.json").exists()
    sums = sum(map(latent_sums, arrays["mean"], arrays["std"]))
    for found, expected in zip(
        (manifest.latent_mean, manifest.latent_std), latent_statistics(sums), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_sets_without_pictures_go_with_those_that_have_them(features, tmp_path, monkeypatch):
    _, args = features
    monkeypatch.setattr(import_features, "_VIDEO_WIDTHS", {"clip_dim": 5, "sync_dim": 3})
    convert(args)
    write_memmaps(tmp_path / "sounds", make_arrays(6, video=False))
    sounds = args | {"folder": tmp_path / "sounds", "out": tmp_path / "sound records"}
    convert(sounds)
    ours, theirs = (RecordSource(a["out"]).manifest for a in (sounds, args))
    assert not ours.has_video and "clip" not in RecordSource(sounds["out"])[0]
    for what in ("sequence", "encoders", "codec"):  # what sources must share
        assert getattr(ours, what) == getattr(theirs, what)


class Interruption(Exception):
    pass


def test_an_interrupted_conversion_resumes(features, tmp_path, monkeypatch):
    _, args = features
    monkeypatch.setattr(import_features, "_SHARD", 2)
    convert(args | {"out": tmp_path / "whole"})
    serialize, calls = import_features.serialize, []

    def interrupted(record):
        calls.append(record["id"])
        if len(calls) == 4:
            raise Interruption
        return serialize(record)

    monkeypatch.setattr(import_features, "serialize", interrupted)
    with pytest.raises(Interruption):
        convert(args)
    assert not (args["out"] / "manifest.json").exists()
    convert(args)
    assert len(calls) == 4 + 4, "the first shard, of two records, is kept"
    whole, resumed = RecordSource(tmp_path / "whole"), RecordSource(args["out"])
    assert whole.manifest == resumed.manifest
    other = args | {"empty_text": tmp_path / "other.npy"}
    np.save(other["empty_text"], np.zeros((7, 6)))
    refused = convert(other)
    assert refused.code == 1 and "was made with other settings (empty_text" in refused.err


def test_few_samples_are_in_memory(tmp_path):
    count = 300
    large = {"text_features": np.zeros((count, 77, 256), np.float16)}
    write_memmaps(tmp_path / "many", make_arrays(count) | large)
    tensors = import_features.open_tensors(tmp_path / "many")
    rows = [(str(i), "") for i in range(count)]
    tracemalloc.start()
    import_features._convert_shard(tmp_path / "part.array_record", tensors, rows, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    size = sum(tensor.path.stat().st_size for tensor in tensors.values())
    assert peak < size / 10, (peak, size)


def test_what_is_not_finite_is_left_out_and_listed(features):
    arrays, args = features
    arrays["sync_features"][2, 0, 0] = 1e6  # beyond float16
    (args["folder"] / "sync_features.memmap").write_bytes(arrays["sync_features"].tobytes())
    done = convert(args)
    assert done.code == LEFT_OUT
    assert "5 records, 1 clips left out (listed in failures.tsv)" in done.out
    listed = (args["out"] / "failures.tsv").read_text().splitlines()
    assert listed == ["id\treason", "c\tc: sync is not finite as float16"]
    assert [RecordSource(args["out"])[i]["id"] for i in (1, 2)] == ["a", "a#3"]


def _edit_meta(args, **changes):
    meta = json.loads((args["folder"] / "meta.json").read_text())
    for name, change in changes.items():
        meta[name] = change and meta[name] | change
    kept = {name: value for name, value in meta.items() if value is not None}
    (args["folder"] / "meta.json").write_text(json.dumps(kept))


def _cut(args, name, size):
    path = args["folder"] / name
    path.write_bytes(path.read_bytes()[:size])


def _replace(args, name, text):
    args[name].write_text(text)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda a: _cut(a, "std.memmap", 100), r"std.memmap: 100 bytes, 1200 were expected .*trun"),
        (lambda a: (a["folder"] / "std.memmap").unlink(), "std.memmap: no such file"),
        (lambda a: _cut(a, "meta.json", 50), "meta.json: damaged"),
        (lambda a: (a["folder"] / "meta.json").unlink(), "it has no meta.json"),
        (lambda a: _edit_meta(a, std=None), "no std; it has clip_features, mean"),
        (lambda a: _edit_meta(a, sync_features=None), "no sync_features"),
        (lambda a: _edit_meta(a, mean={"dtype": "torch.int8"}), "mean is torch.int8, known are"),
        (lambda a: _edit_meta(a, std={"shape": [5, 25, 4]}), "the N of mean"),
        (lambda a: _replace(a, "tsv", "id\tlabel\na\tb\n"), "has 1 rows, .* 6 clips"),
        (lambda a: _replace(a, "tsv", "id,label\na,b\n"), "needed are 'id' and 'caption'"),
        (lambda a: _replace(a, "tsv", "id\tlabel\na\tb\n\tc\n"), "line 3 has no id"),
        (lambda a: a.update(tsv="nowhere.tsv"), "nowhere.tsv: unreadable"),
        (lambda a: a.update(codec="nowhere"), "not a codec folder"),
        (lambda a: a.update(empty_text=a["tsv"]), "clips.tsv: truncated, or not a PyTorch file"),
        (lambda a: np.save(a["empty_text"], np.zeros((3, 6))), r"are \(3, 6\), those of"),
        (
            lambda a: a.update(duration=8),
            "25 x 4 for each clip, but 8 s with the codec .* give 250 x 4",
        ),
        (
            lambda a: LinearCodec(np.zeros(160), np.eye(9, 160), 1.0).save(a["codec"]),
            "25 x 4 for each clip, but 0.8 s with the codec .* give 25 x 9",
        ),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(features, damage, message):
    _, args = features
    damage(args)
    done = convert(args)
    assert done.code == 1 and len(done.err.splitlines()) == 1 and re.search(message, done.err)
    assert not args["out"].exists()


def test_a_folder_with_something_else_in_it_is_left_alone(features):
    _, args = features
    args["out"].mkdir()
    (args["out"] / "thesis.tex").write_text("")
    done = convert(args)
    assert done.code == 1 and "holds other files and no settings.json" in done.err
    assert [path.name for path in args["out"].iterdir()] == ["thesis.tex"]


def test_the_empty_text_of_mmaudios_weights(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"empty_string_feat": torch.full((7, 6), 2.0)}, tmp_path / "weights.pth")
    found = import_features.read_empty_text(tmp_path / "weights.pth")
    np.testing.assert_array_equal(found, np.full((7, 6), 2, np.float32))
    torch.save({"bias": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(FeatureError, match="no empty_string_feat among its tensors .bias"):
        import_features.read_empty_text(tmp_path / "other.pth")

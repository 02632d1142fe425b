import dataclasses
import json
import pickle

import grain
import numpy as np
import pytest

from vcm_jax.records import schema as records
from vcm_jax.records.manifest import MANIFEST, Manifest, write_empty_text, write_manifest
from vcm_jax.records.schema import (
    EMPTY_TEXT,
    TEXT_TABLE,
    RecordError,
    describe_fields,
    deserialize,
    latent_statistics,
    latent_sums,
    serialize,
    write_shard,
    write_text_table,
)
from vcm_jax.records.sequence import SequenceConfig
from vcm_jax.records.source import RecordSource

SEQUENCE = SequenceConfig(duration=0.64)


def record(index: int, video: bool = True) -> dict:
    rng = np.random.default_rng(index)
    shapes = {"latent_mean": (20, 4), "latent_std": (20, 4), "text": (77, 5)}
    if video:
        shapes |= {"clip": (5, 6), "sync": (8, 7)}
    arrays = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    return arrays | {"id": f"größe/{index}", "caption": f"clip {index}"}


def write(folder, counts=(3, 4), **changes):
    """A records folder with shards of so many records."""
    shards, index = [], 0
    for number, count in enumerate(counts):
        path = folder / f"part-{number:05d}.array_record"
        write_shard(path, [serialize(record(index + i)) for i in range(count)])
        index += count
        shards.append({"name": path.name, "records": count, "bytes": path.stat().st_size})
    np.save(folder / EMPTY_TEXT, np.ones((77, 5), np.float32))
    manifest = Manifest(
        sequence=SEQUENCE,
        encoders={"name": "none", "clip_dim": 6},
        codec={"name": "none", "fingerprint": "0", "latent_dim": 4},
        has_video=True,
        num_records=index,
        num_failures=0,
        fields=describe_fields(deserialize(serialize(record(0)))),
        latent_mean=[0.0] * 4,
        latent_std=[1.0] * 4,
        shards=shards,
        fingerprint="0",
    )
    write_manifest(folder, dataclasses.replace(manifest, **changes))
    return folder


def test_a_record_comes_back():
    original = record(1)
    back = deserialize(serialize(original))
    assert back["id"] == "größe/1" and back["caption"] == "clip 1"
    assert set(back) == set(original)
    for name in ("latent_mean", "latent_std"):
        np.testing.assert_array_equal(back[name], original[name].astype(np.float32))
        assert back[name].dtype == np.float32
    for name in ("clip", "sync", "text"):
        np.testing.assert_array_equal(back[name], original[name].astype(np.float16))
        assert back[name].dtype == np.float16


def test_a_missing_modality_is_a_missing_field():
    back = deserialize(serialize(record(1, video=False)))
    assert set(back) == {"id", "caption", "latent_mean", "latent_std", "text"}


@pytest.mark.parametrize("value", [np.nan, np.inf, 70_000.0])
def test_what_float16_cannot_hold_fails(value):
    bad = record(1)
    bad["sync"][2, 3] = value
    with pytest.raises(RecordError, match="größe/1: sync is not finite as float16"):
        serialize(bad)
    bad = record(1) | {"latent_mean": np.full((20, 4), 70_000.0)}
    assert deserialize(serialize(bad))["latent_mean"].max() == 70_000


def test_other_bytes_fail(monkeypatch):
    with pytest.raises(RecordError, match="not a record"):
        deserialize(b"\x81\xa1")
    whole = serialize(record(1))
    for length in (0, 1, 40, len(whole) // 2, len(whole) - 1):
        with pytest.raises(RecordError, match="not a record"):
            deserialize(whole[:length])
    monkeypatch.setattr(records, "VERSION", 1)
    old = serialize(record(1))
    monkeypatch.undo()
    with pytest.raises(RecordError, match="version 1, this program reads version 2"):
        deserialize(old)


def test_source(tmp_path):
    source = RecordSource(write(tmp_path))
    assert len(source) == 7 and source.manifest.sequence == SEQUENCE
    assert [source[i]["id"] for i in range(7)] == [f"größe/{i}" for i in range(7)]
    np.testing.assert_array_equal(source[5]["clip"], record(5)["clip"].astype(np.float16))
    np.testing.assert_array_equal(source.empty_text, np.ones((77, 5)))
    assert source.manifest.latent_dim == 4
    assert source.manifest.fields["sync"] == {"shape": [8, 7], "dtype": "float16"}
    for index in (7, -1):
        with pytest.raises(IndexError, match=f"record {index} of 7"):
            source[index]


def test_source_in_other_processes_and_threads(tmp_path):
    source = RecordSource(write(tmp_path))
    source[0]
    again = pickle.loads(pickle.dumps(source))
    assert again[4]["id"] == "größe/4" and again.manifest == source.manifest
    dataset = grain.MapDataset.source(source).shuffle(seed=1).map(lambda r: r["id"])
    reading = dataset.to_iter_dataset(grain.ReadOptions(num_threads=8, prefetch_buffer_size=8))
    assert sorted(reading) == [f"größe/{i}" for i in range(7)]


def test_folders_that_are_not_whole(tmp_path):
    def fails(reason, folder):
        with pytest.raises(RecordError, match=reason) as caught:
            RecordSource(folder)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)

    def fresh(name, **changes):
        (tmp_path / name).mkdir()
        return write(tmp_path / name, **changes)

    fails("no such records folder", tmp_path / "nothing")
    half = fresh("half")
    (half / MANIFEST).unlink()
    fails("no manifest.json.*not finished", half)
    cut = fresh("cut")
    shard = cut / "part-00001.array_record"
    shard.write_bytes(shard.read_bytes()[:-1])
    fails("part-00001.array_record: .* bytes, the manifest says .* cut off", cut)
    lost = fresh("lost")
    (lost / shard.name).unlink()
    fails("part-00001.array_record: missing", lost)
    more = fresh("more")
    (more / "extra.array_record").write_bytes(b"")
    fails("extra.array_record: not in the manifest", more)
    fails("7 records, the manifest says 6", fresh("count", num_records=6))
    fails("records of version 1, this program reads version 2", fresh("version", version=1))
    fails("no records", fresh("empty", counts=()))
    garbage = fresh("garbage")
    size = (garbage / shard.name).stat().st_size
    (garbage / shard.name).write_bytes(bytes(size))
    fails("unreadable", garbage)
    damaged = fresh("damaged")
    (damaged / MANIFEST).write_text("{")
    fails("manifest.json: damaged", damaged)
    content = json.loads((half.parent / "count" / MANIFEST).read_text())
    del content["shards"]
    (damaged / MANIFEST).write_text(json.dumps(content))
    fails("manifest.json: damaged", damaged)


def test_latent_statistics_are_those_of_drawn_latents():
    rng = np.random.default_rng(0)
    clips = [(rng.standard_normal((50, 3)) * 2 + 100, rng.uniform(0.5, 3, (50, 3))) for _ in "ab"]
    sums = sum(latent_sums(mean, std) for mean, std in clips)
    mean, std = latent_statistics(sums)
    drawn = np.concatenate(
        [m + s * rng.standard_normal((20_000, *m.shape)) for m, s in clips], axis=1
    ).reshape(-1, 3)
    np.testing.assert_allclose(mean, drawn.mean(0), rtol=1e-3)
    np.testing.assert_allclose(std, drawn.std(0), rtol=1e-2)


def test_a_shard_appears_whole_or_not_at_all(tmp_path):
    def broken():
        yield serialize(record(0))
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_shard(tmp_path / "part.array_record", broken())
    assert not list(tmp_path.iterdir())


def test_text_features_can_be_in_a_table(tmp_path):
    rng = np.random.default_rng(0)
    texts = rng.standard_normal((3, 77, 5)).astype(np.float16)
    table = write_text_table(tmp_path, texts)
    packed = []
    for i in range(4):
        original = {name: value for name, value in record(i).items() if name != "text"}
        packed.append(serialize(original | {"text_row": i % 3}))
    path = tmp_path / "part-00000.array_record"
    write_shard(path, packed)
    shard = {"name": path.name, "records": 4, "bytes": path.stat().st_size}
    fields = describe_fields(deserialize(serialize(record(0))))
    folder = write(
        tmp_path, counts=(), fields=fields, shards=[shard], num_records=4, text_table=table
    )
    source = RecordSource(folder)
    for i in range(4):
        np.testing.assert_array_equal(source[i]["text"], texts[i % 3])
        assert "text_row" not in source[i]
    (folder / TEXT_TABLE).unlink()
    with pytest.raises(RecordError, match="text_table: missing"):
        RecordSource(folder)


def test_a_record_of_another_shape_names_the_field(tmp_path):
    source = RecordSource(write(tmp_path))
    source.manifest.fields["sync"]["shape"] = [9, 7]
    with pytest.raises(RecordError, match=r"record 3: sync is \(8, 7\), .* says \(9, 7\)"):
        source[3]


def test_latent_statistics_are_compared_with_the_records(tmp_path, monkeypatch):
    folder = write(tmp_path, counts=(40, 40))
    source = RecordSource(folder)
    sums = sum(latent_sums(r["latent_mean"], r["latent_std"]) for r in source)
    mean, std = latent_statistics(sums)
    good = dataclasses.replace(source.manifest, latent_mean=mean.tolist(), latent_std=std.tolist())
    for change, fits in (
        ({}, True),
        ({"latent_std": (3 * std).tolist()}, False),
        ({"latent_mean": (mean + 3 * std).tolist()}, False),
    ):
        write_manifest(folder, dataclasses.replace(good, **change))
        for count in (20, 80):
            if fits:
                RecordSource(folder).check_statistics(count)
                continue
            with pytest.raises(RecordError, match="manifest.json: its latent statistics do not"):
                RecordSource(folder).check_statistics(count)

    # Damaged records are passed over, unless all are.
    write_manifest(folder, good)
    source, read = RecordSource(folder), RecordSource.__getitem__
    for damaged, fits in (({0, 3, 19}, True), (set(range(80)), False)):

        def item(self, index, damaged=damaged):
            if index in damaged:
                raise RecordError(f"record {index}: damaged")
            return read(self, index)

        monkeypatch.setattr(RecordSource, "__getitem__", item)
        for count in (20, 80):
            if fits:
                source.check_statistics(count)
                continue
            with pytest.raises(RecordError, match=f"all {count} records that were read are dam"):
                source.check_statistics(count)


def damage(path, position: int):
    """Flips a bit of a byte."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << position % 8
    path.write_bytes(bytes(data))


def contents(folder) -> list:
    """All that training reads of a folder."""
    source = RecordSource(folder)
    arrays = [np.array(value).tolist() for record in source for value in record.values()]
    return [arrays, source.empty_text.tolist(), dataclasses.asdict(source.manifest)]


def with_text_table(folder, seed: int = 0):
    """A folder of four records with three texts, as extraction writes it."""
    texts = np.random.default_rng(seed).standard_normal((3, 77, 5)).astype(np.float16)
    changes = {"text_table": write_text_table(folder, texts)}
    changes["empty_text"] = write_empty_text(folder, np.ones((77, 5)))
    path = folder / "part-00000.array_record"
    packed = []
    for i in range(4):
        original = {name: value for name, value in record(i).items() if name != "text"}
        packed.append(serialize(original | {"text_row": i % 3}))
    write_shard(path, packed)
    changes["shards"] = [{"name": path.name, "records": 4, "bytes": path.stat().st_size}]
    write(folder, counts=(), num_records=4, **changes)
    return folder


def test_any_damaged_byte_is_found_or_changes_nothing(tmp_path):
    folder = with_text_table(tmp_path)
    whole = contents(folder)
    for path in sorted(tmp_path.iterdir()):
        data, found = path.read_bytes(), 0
        used = [i for i, byte in enumerate(data) if byte]  # array_records are mostly padding
        positions = used[:: max(1, len(used) // 150)]
        for position in positions:
            damage(path, position)
            try:
                assert contents(folder) == whole, (path.name, position)
            except RecordError as error:
                found += 1
                assert str(folder) in str(error)
            path.write_bytes(data)
        assert found > 0.8 * len(positions), path.name


def test_a_text_table_of_other_texts_is_found(tmp_path):
    folder = with_text_table(tmp_path)
    write_text_table(folder, np.zeros((3, 77, 5)))
    with pytest.raises(RecordError, match="record 1: row 1 of text_table is not the one"):
        RecordSource(folder)[1]


def test_folders_without_hashes_are_read(tmp_path):
    folder = with_text_table(tmp_path)
    content = json.loads((folder / MANIFEST).read_text())
    del content["hash"], content["empty_text"], content["text_table"]["hashes"]
    (folder / MANIFEST).write_text(json.dumps(content))
    write_text_table(folder, np.zeros((3, 77, 5)))
    source = RecordSource(folder)
    assert not source[1]["text"].any() and source.empty_text.all()


@pytest.mark.parametrize("clip_id", ["../x", "/abs/x", "a/../../x"])
def test_ids_that_lead_out_of_a_folder(tmp_path, clip_id, monkeypatch):
    with pytest.raises(RecordError, match="the id .* does not name a file inside of a folder"):
        serialize(record(0) | {"id": clip_id})
    monkeypatch.setattr(records, "check_id", lambda clip_id: None)  # as earlier versions wrote
    packed = serialize(record(0) | {"id": clip_id})
    with pytest.raises(RecordError, match=f"its id '{clip_id}' leads out of a folder"):
        deserialize(packed)


def test_ids_of_earlier_versions_that_stay_inside_are_read(monkeypatch):
    monkeypatch.setattr(records, "check_id", lambda clip_id: None)
    for clip_id in ("https://example.org/x", "a//b", "..a/b.."):
        assert deserialize(serialize(record(0) | {"id": clip_id}))["id"] == clip_id

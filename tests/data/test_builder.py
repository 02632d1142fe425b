"""Each corpus in its real layout, in miniature."""

import csv
import functools
import json

import numpy as np
import pytest
import soundfile
import tensorflow_datasets as tfds
from commands import run_command

from vcm_jax.data import builder, corpora
from vcm_jax.data.builder import build
from vcm_jax.data.corpora import CorpusError
from vcm_jax.media.write import write_mp4
from vcm_jax.records.source import RecordSource

RATE, SECONDS = 16_000, 0.8
SMALL = dict(duration=SECONDS, clip_dim=8, sync_dim=12, text_dim=6)


def tone(seed: int, seconds: float = SECONDS) -> np.ndarray:
    rng = np.random.default_rng(seed)
    times = np.arange(round(seconds * RATE)) / RATE
    sound = sum(np.sin(2 * np.pi * rng.uniform(100, 3000) * times) for _ in range(3))
    return (0.1 * sound * np.linspace(1, 0.2, len(times))).astype(np.float32)


def write_sound(path, seed: int, seconds: float = SECONDS):
    path.parent.mkdir(parents=True, exist_ok=True)
    form = "FLAC" if path.suffix == ".flac" else "WAV"
    soundfile.write(path, tone(seed, seconds), RATE, format=form)


def write_csv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def ids(folder, split):
    return [record["id"] for record in RecordSource(folder / split)]


@pytest.fixture(scope="module")
def vggsound(tmp_path_factory):
    """Eight rows, one of them without a file; ids with leading - and _; a label with a comma."""
    folder = tmp_path_factory.mktemp("vggsound")
    names = [
        "-_a-b_c1234",
        "_bcdefghijk",
        "cdefghijklm",
        "-defghijklm",
        "efghijklmno",
        "f_ghijklmno",
    ]
    rows = [
        [name, 3 * i, "dog barking, howling" if i % 2 else "rain", "train"]
        for i, name in enumerate(names)
    ]
    rows += [["-test_ghijk", 130, "rain", "test"], ["gone_ghijkl", 4, "rain", "train"]]
    write_csv(folder / "vggsound.csv", rows)
    for i, (name, start, _, _) in enumerate(rows[:-1]):
        frames = np.random.default_rng(i).integers(0, 255, (20, 16, 24, 3)).astype(np.uint8)
        write_mp4(folder / "video" / f"{name}_{start:06d}.mp4", frames, 25, tone(i), RATE)
    return folder


def test_vggsound(vggsound, tmp_path):
    folder = build("vggsound", vggsound, tmp_path, options={"val_size": 2}, **SMALL)
    assert folder == tmp_path / "vggsound" / "2.0.0"
    found = {split: ids(folder, split) for split in ("train", "val", "test")}
    assert found["test"] == ["-test_ghijk_000130"]
    everything = sum(found.values(), [])
    assert len(set(everything)) == 7 and "-_a-b_c1234_000000" in everything
    failures = "".join((folder / s / "failures.tsv").read_text() for s in ("train", "val"))
    assert "gone_ghijkl_000004\tno such file" in failures
    # The split follows from the ids alone, not from the files that are there.
    options = {"val_size": 2}
    assert {row[0] for row in corpora.vggsound(vggsound, **options)["val"]} >= set(found["val"])
    manifests = [RecordSource(folder / split).manifest for split in found]
    assert len({manifest.codec["fingerprint"] for manifest in manifests}) == 1
    assert all(manifest.has_video for manifest in manifests)

    # TFDS reads the same files.
    source, ours = tfds.data_source("vggsound", data_dir=tmp_path), RecordSource(folder / "train")
    assert set(source) == set(found) and len(source["train"]) == len(ours)
    for theirs, mine in zip(source["train"], ours):
        assert theirs["id"].decode() == mine["id"] and theirs["caption"].decode() == mine["caption"]
        for name in ("latent_mean", "latent_std", "clip", "sync"):
            np.testing.assert_array_equal(theirs[name], mine[name], strict=True)
    # Repeated captions are stored once; their features are those of the caption.
    assert manifests[0].text_table["rows"] == 2
    texts = {record["caption"]: record["text"] for record in ours}
    assert set(texts) == {"rain", "dog barking, howling"}
    assert (texts["rain"] != texts["dog barking, howling"]).any()

    # The same command again does nothing.
    before = (folder / "train" / "manifest.json").stat().st_mtime_ns
    build("vggsound", vggsound, tmp_path, options={"val_size": 2}, **SMALL)
    assert (folder / "train" / "manifest.json").stat().st_mtime_ns == before


def test_vggsound_with_a_val_list(vggsound, tmp_path):
    tsv = tmp_path / "val.tsv"
    tsv.write_text("id\tlabel\n_bcdefghijk_000003\train\n")
    found = corpora.vggsound(vggsound, val_list=tsv)
    assert [row[0] for row in found["val"]] == ["_bcdefghijk_000003"]
    assert len(found["train"]) == 6
    tsv.write_text("id\tlabel\nother_000003\train\n")
    with pytest.raises(CorpusError, match="val.tsv: 'other_000003' is not among"):
        corpora.vggsound(vggsound, val_list=tsv)


def test_audiocaps(tmp_path):
    folder = tmp_path / "audiocaps"
    header = ["audiocap_id", "youtube_id", "start_time", "caption"]
    write_csv(folder / "train.csv", [header, [1, "-abc", 30, "a, b"], [2, "_def", 0, "c"]])
    write_csv(folder / "val.csv", [header, [3, "ghi", 10, "d"]])
    write_csv(
        folder / "test.csv", [header, *([10 + i, "jkl", 5, f"caption {i}"] for i in range(5))]
    )
    for i, name in enumerate(["-abc_30", "_def", "3", "jkl_5"]):  # all three kinds of names
        write_sound(folder / "audio" / f"{name}.wav", i)
    out = build("audiocaps", folder, tmp_path / "out", **SMALL)
    assert ids(out, "train") == ["-abc_30", "_def_0"] and ids(out, "val") == ["ghi_10"]
    assert ids(out, "test") == ["jkl_5", *(f"jkl_5#{i}" for i in range(2, 6))]
    test = RecordSource(out / "test")
    assert [record["caption"] for record in test] == [f"caption {i}" for i in range(5)]
    assert not test.manifest.has_video
    rows = corpora.audiocaps(folder, pattern="x{audiocap_id}")["train"]
    assert [row[2] for row in rows] == ["x1", "x2"]
    with pytest.raises(CorpusError, match="pattern={nothing}"):
        corpora.audiocaps(folder, pattern="{nothing}")


def test_clotho(tmp_path):
    folder = tmp_path / "clotho"
    header = ["file_name", *(f"caption_{i}" for i in range(1, 6))]
    name = "Bäche [1] (rauschen).wav"
    for split in ("development", "validation", "evaluation"):
        rows = [[name, *(f"{split} {i}" for i in range(5))]]
        write_csv(folder / f"clotho_captions_{split}.csv", [header, *rows])
        write_sound(folder / split / name, len(split), seconds=2.0)
    out = build("clotho", folder, tmp_path / "out", **SMALL)
    train = list(RecordSource(out / "train"))
    assert len(train) == 10, "two segments of 0.8 s in 2 s, five captions each"
    assert train[0]["id"] == "Bäche [1] (rauschen)@0" and train[9]["id"].endswith("@0.8#5")
    assert [r["caption"] for r in train[5:]] == [f"development {i}" for i in range(5)]
    np.testing.assert_array_equal(train[0]["latent_mean"], train[4]["latent_mean"])
    assert abs(train[0]["latent_mean"] - train[5]["latent_mean"]).max() > 0.1
    assert RecordSource(out / "train").manifest.text_table["rows"] == 5


def test_wavcaps(tmp_path):
    folder = tmp_path / "wavcaps"
    lists = {"fsd": [17, 18], "bbc": ["17"], "as": ["Yab-c.wav"]}
    for part, names in lists.items():
        data = [{"id": i, "caption": f"{part} {i}", "duration": 9.5} for i in names]
        path = folder / "json_files" / f"{part}_final.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"num_captions_per_audio": 1, "data": data}))
    for i, name in enumerate(
        ["FreeSound_flac/17", "FreeSound_flac/18", "BBC_flac/17", "AudioSet_SL_flac/Yab-c"]
    ):
        write_sound(folder / f"{name}.flac", i, seconds=1.0)
    out = build("wavcaps", folder, tmp_path / "out", **SMALL)
    found = {record["id"]: record for record in RecordSource(out / "train")}
    assert set(found) == {"freesound/17", "freesound/18", "bbc/17", "audioset/Yab-c"}
    assert found["bbc/17"]["caption"] == "bbc 17"
    different = found["bbc/17"]["latent_mean"] - found["freesound/17"]["latent_mean"]
    assert abs(different).max() > 0.1
    (folder / "json_files" / "bbc_final.json").write_text('{"data": [{"name": 1}]}')
    with pytest.raises(CorpusError, match="bbc_final.json: not a WavCaps list .no field 'id'"):
        corpora.wavcaps(folder)


def test_folder(tmp_path):
    folder = tmp_path / "mine"
    for i in range(3):
        write_sound(folder / "sub" / f"s{i}.wav", i)
    out = build("folder", folder, tmp_path / "out", **SMALL)
    assert ids(out, "train") == ["sub/s0", "sub/s1", "sub/s2"]
    (folder / "train.tsv").write_text("id\tcaption\ns0\tx\ns1\ty\n")
    (folder / "test.tsv").write_text("id\tcaption\ns2\tz\n")
    out = build("folder", folder, tmp_path / "out2", **SMALL)
    assert ids(out, "train") == ["s0", "s1"] and ids(out, "test") == ["s2"]


def test_captions_with_quotes_and_linked_folders(tmp_path):
    folder = tmp_path / "audiocaps"
    header = ["audiocap_id", "youtube_id", "start_time", "caption"]
    captions = ['"quoted"', 'say "hi", twice', '"big" cave', "two\nlines", "a\ttab"]
    rows = [[i, f"v{i}", 0, caption] for i, caption in enumerate(captions)]
    for split in ("train", "val", "test"):
        write_csv(folder / f"{split}.csv", [header, *rows])
    for i in range(5):
        write_sound(tmp_path / "elsewhere" / f"v{i}_0.wav", i)
    (folder / "audio").symlink_to(tmp_path / "elsewhere")
    out = build("audiocaps", folder, tmp_path / "out", **SMALL)
    found = [record["caption"] for record in RecordSource(out / "train")]
    assert found == [*captions[:3], "two lines", "a tab"]


def test_command(tmp_path):
    folder = tmp_path / "mine"
    for i in range(3):
        write_sound(folder / f"s{i}.wav", i)
    arguments = [f"--manual_dir={folder}", f"--out={tmp_path / 'out'}", "--duration=0.8"]
    run = functools.partial(run_command, builder, *arguments, "--workers=1", positional="x")
    assert run("folder").code == 0
    (folder / "s1.wav").write_bytes(b"no sound")
    done = run("folder", f"--out={tmp_path / 'two'}")
    assert done.code == 3 and "2 records, 1 clips left out" in done.out
    assert run("other").code == 1 and run().err.startswith("error: name one corpus: vggsound, ")


def test_what_does_not_fit(vggsound, tmp_path):
    def fails(reason, corpus, folder, **kwargs):
        with pytest.raises(ValueError, match=reason) as caught:
            build(corpus, folder, tmp_path / "out", **kwargs, **SMALL)
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()

    fails("corpus 'esc50' is not one of vggsound, ", "esc50", tmp_path)
    fails("nowhere: no such folder", "clotho", tmp_path / "nowhere")
    fails("train.csv: no such file", "audiocaps", tmp_path)
    fails("7 train rows, 7 of them for validation: give --val_list", "vggsound", vggsound)
    fails("vggsound takes no --pattern", "vggsound", vggsound, options={"pattern": "x"})
    fails("has no split 'dev'", "vggsound", vggsound, splits=["dev"], options={"val_size": 1})
    fails("no clips for split val", "vggsound", vggsound, options={"val_size": 0})
    fails(
        "codec comes from split train",
        "vggsound",
        vggsound,
        splits=["test"],
        options={"val_size": 1},
    )
    other = tmp_path / "other"
    write_csv(other / "vggsound.csv", [["a", 1, "x", "train"], ["b", "x", "train"]])
    fails("vggsound.csv, line 2: 3 fields, needed are id, start, label, split", "vggsound", other)
    write_csv(other / "vggsound.csv", [["a", "one", "x", "train"]])
    fails("line 1: start 'one' is no whole number", "vggsound", other)
    write_csv(other / "train.csv", [["audiocap_id", "youtube_id", "start", "caption"]])
    fails("train.csv: no column 'start_time'; it has audiocap_id,", "audiocaps", other)
    write_csv(other / "clotho_captions_development.csv", [["file_name", "caption"]])
    fails("development.csv: no column 'caption_1'", "clotho", other)
    fails("none of fsd_final.json", "wavcaps", other)


def test_shards_without_records_are_not_listed_to_tfds(tmp_path, monkeypatch):
    monkeypatch.setattr(builder.extraction, "CLIPS_PER_SHARD", 1)
    for i in (0, 2):
        write_sound(tmp_path / "mine" / f"s{i}.wav", i)
    (tmp_path / "mine" / "s1.wav").write_bytes(b"no sound")
    folder = build("folder", tmp_path / "mine", tmp_path / "out", **SMALL)
    assert [file.name for file in sorted(folder.glob("train/*.array_record"))] == [
        "part-00000.array_record",
        "part-00002.array_record",
    ]
    source = tfds.data_source("folder", data_dir=tmp_path / "out")["train"]
    assert [record["id"] for record in source] == [b"s0", b"s2"]

"""From what was downloaded of a corpus to records, as a data set of TensorFlow Datasets.

    python -m vcm_jax.data.builder vggsound --manual_dir=downloads/vggsound --out=records

writes records/vggsound/VERSION/{train,val,test}, each a records folder to train on, and beside them
the metadata with which `tfds.data_source("vggsound", data_dir="records", split="train")` reads the
same files. The corpora are vggsound, audiocaps, clotho, wavcaps and folder; `vcm_jax.data.corpora`
says how each must lie in --manual_dir. It goes on where it was stopped, and --shard=i/n shares the
work between processes, as the extraction command does, whose other flags it takes.
"""

import inspect
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import app, flags

from vcm_jax.atomic import atomic_path
from vcm_jax.data.corpora import CORPORA, CorpusError
from vcm_jax.features import extract as extraction
from vcm_jax.media.clips import VIDEO_SUFFIXES
from vcm_jax.records.schema import MANIFEST, VERSION, Manifest, read_manifest

SPLITS = ("train", "val", "test")
TFDS_VERSION = f"{VERSION}.0.0"


def _write_list(path: Path, rows) -> None:
    """The TSV that extraction takes; only written anew when it changes."""
    lines = ["id\tcaption\tfile\tstart"]
    for clip_id, caption, file, start in rows:
        fields = (clip_id, " ".join(caption.split()), file, f"{start:g}")
        lines.append("\t".join(fields))
    text = "\n".join(lines) + "\n"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        with atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


def tfds_features(manifest: Manifest):
    """The tfds.features.FeaturesDict of records."""
    import tensorflow_datasets as tfds  # takes a while to import, and training does without

    fields = dict(manifest.fields)
    if manifest.text_table:
        fields["text_row"] = {"shape": [], "dtype": "int32"}
        del fields["text"]
    tensor = lambda field: tfds.features.Tensor(
        shape=tuple(field["shape"]), dtype=np.dtype(field["dtype"]), encoding="bytes"
    )
    return tfds.features.FeaturesDict(
        {"id": tfds.features.Text(), "caption": tfds.features.Text()}
        | {name: tensor(field) for name, field in fields.items()}
    )


def write_tfds_metadata(folder: Path, name: str) -> None:
    """Describe the splits in `folder` to TFDS: dataset_info.json and features.json.

    The records stay where and as they are. Text features in a text table are not among the
    features that TFDS gives, but `text_row` is: the row of SPLIT/text_table.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import dataset_info, naming

    manifests = {
        split: read_manifest(folder / split)
        for split in SPLITS
        if (folder / split / MANIFEST).exists()
    }
    splits = []
    for split, manifest in manifests.items():
        # Part numbers without a file are parts none of whose clips could be used.
        lengths = {shard["name"]: shard["records"] for shard in manifest.shards}
        last = max(int(name.split("-")[1].split(".")[0]) for name in lengths)
        splits.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[
                    lengths.get(f"part-{i:05d}.array_record", 0) for i in range(last + 1)
                ],
                num_bytes=sum(shard["bytes"] for shard in manifest.shards),
                filename_template=naming.ShardedFileTemplate(
                    data_dir=folder,
                    template="{SPLIT}/part-{SHARD_INDEX}.{FILEFORMAT}",
                    dataset_name=name,
                    split=split,
                    filetype_suffix="array_record",
                ),
            )
        )
    identity = dataset_info.DatasetIdentity(
        name=name, version=tfds.core.Version(TFDS_VERSION), data_dir=str(folder), module_name=""
    )
    info = dataset_info.DatasetInfo(
        builder=identity, features=tfds_features(next(iter(manifests.values())))
    )
    info.set_file_format("array_record")
    info.set_splits(tfds.core.SplitDict(splits))
    with tempfile.TemporaryDirectory(dir=folder, prefix=".tfds") as temporary:
        info.write_to_directory(temporary)
        for file in sorted(Path(temporary).iterdir(), reverse=True):
            os.replace(file, folder / file.name)


def build(
    corpus: str,
    manual_dir,
    out,
    *,
    splits: Sequence[str] | None = None,
    options: dict | None = None,
    codec=None,
    **settings,
) -> Path:
    """Extract a corpus into `out`/CORPUS/VERSION/SPLIT; returns `out`/CORPUS/VERSION.

    Args:
      corpus: a name in CORPORA.
      manual_dir: what was downloaded.
      out: the data_dir of TFDS.
      splits: some of train, val, test; None builds those that the corpus has.
      options: of the corpus (see its function in `vcm_jax.data.corpora`).
      codec: codec folder; None fits the linear codec on train, for all splits.
      settings: of `vcm_jax.features.extract.extract`.

    Raises:
      CorpusError, ValueError: the files do not fit the corpus, a split without clips.
    """
    if corpus not in CORPORA:
        raise CorpusError(f"corpus {corpus!r} is not one of {', '.join(CORPORA)}")
    manual_dir, folder = Path(manual_dir), Path(out) / corpus / TFDS_VERSION
    if not manual_dir.is_dir():
        raise CorpusError(f"{manual_dir}: no such folder (manual_dir)")
    known = inspect.signature(CORPORA[corpus]).parameters
    options = {key: value for key, value in (options or {}).items() if value is not None}
    if unknown := options.keys() - known.keys():
        raise CorpusError(f"{corpus} takes no --{min(unknown)}")
    if "duration" in known and "duration" in settings:
        options["duration"] = settings["duration"]
    found = CORPORA[corpus](manual_dir, **options)
    for split in splits or found:
        if split not in found:
            raise CorpusError(f"{corpus} in {manual_dir} has no split {split!r}")
        if found[split] == []:
            raise CorpusError(
                f"{manual_dir}: {corpus} has no clips for split {split}: name others in --splits"
            )
    videos = corpus == "vggsound" or (
        corpus == "folder"
        and any(f.suffix.lower() in VIDEO_SUFFIXES for f in manual_dir.rglob("*"))
    )
    chosen = [split for split in SPLITS if split in (splits or found)]
    train_codec = folder / "train" / "codec"
    if codec is None and chosen[0] != "train" and not train_codec.exists():
        raise CorpusError(f"the codec comes from split train, which is not there: {train_codec}")
    for split in chosen:
        captions = found[split]
        if isinstance(captions, list):
            captions = folder / f"{split}.tsv"
            _write_list(captions, found[split])
        shared = codec if codec is not None or split == "train" else train_codec
        print(f"{corpus}, {split}:", flush=True)
        extraction.extract(
            folder / split,
            **{"videos" if videos else "sounds": manual_dir},
            captions=captions,
            codec=shared,
            **settings,
        )
    if all((folder / split / MANIFEST).exists() for split in chosen):
        write_tfds_metadata(folder, corpus)
    return folder


def _define_flags():
    extraction.define_flags(sources=False)
    flags.DEFINE_string("manual_dir", None, "Folder of what was downloaded.", required=True)
    flags.DEFINE_list("splits", None, "Some of train, val, test; all that there are by default.")
    flags.DEFINE_string("val_list", None, "vggsound: TSV whose first column are the val ids.")
    flags.DEFINE_integer("val_size", None, "vggsound: train clips kept for val (2048).")
    flags.DEFINE_string("pattern", None, "audiocaps: file names, e.g. {youtube_id}_{start_time}.")


def main(argv):
    if len(argv) != 2:
        raise app.UsageError(f"name one corpus: {', '.join(CORPORA)}")
    value = lambda name: flags.FLAGS[name].value
    try:
        folder = build(
            argv[1], value("manual_dir"), value("out"), splits=value("splits"),
            options={name: value(name) for name in ("val_list", "val_size", "pattern")},
            **extraction.settings_from_flags(),
        )  # fmt: skip
    except ValueError as error:
        sys.exit(f"error: {error}")
    for split in SPLITS:
        if (folder / split / MANIFEST).exists():
            manifest = read_manifest(folder / split)
            print(f"{folder / split}: {manifest.num_records} records, "
                  f"{manifest.num_failures} clips left out")  # fmt: skip


if __name__ == "__main__":
    _define_flags()
    app.run(main)

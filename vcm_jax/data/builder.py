"""The corpus builder: the downloaded files of a corpus become records.

    python -m vcm_jax.data.builder vggsound --manual_dir=downloads/vggsound --out=records
    python -m vcm_jax.data.builder clotho --manual_dir=downloads/clotho --splits=test --out=records
    python -m vcm_jax.data.builder folder --manual_dir=mine --duration=4 --out=records

This writes records/vggsound/VERSION/{train,val,test}, each a records folder to train on, and beside
them the metadata with which TensorFlow Datasets reads the same files:
`tfds.data_source("vggsound", data_dir="records", split="train")`. The corpora are vggsound,
audiocaps, clotho, wavcaps and folder; `vcm_jax.data.corpora` describes what each must have in
--manual_dir. The other flags are those of the extraction command. If interrupted, rerun it: it
resumes. --shard=0/4 ... --shard=3/4 divide the work between processes.
"""

import inspect
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags

from vcm_jax.cli import heading, run
from vcm_jax.data.corpora import CORPORA, CorpusError
from vcm_jax.features import extract as extraction
from vcm_jax.features.shards import shard_paths
from vcm_jax.media.clips import VIDEO_SUFFIXES, list_files
from vcm_jax.media.tables import write_table
from vcm_jax.records.manifest import MANIFEST, Manifest, read_manifest
from vcm_jax.records.schema import VERSION

SPLITS = ("train", "val", "test")
TFDS_VERSION = f"{VERSION}.0.0"


def _write_list(path: Path, rows) -> None:
    """Write the TSV that extraction reads."""
    table = [
        (clip_id, " ".join(caption.split()), file, f"{start:g}")
        for clip_id, caption, file, start in rows
    ]
    write_table(path, ("id", "caption", "file", "start"), table)


def tfds_features(manifest: Manifest):
    """Describe records as a tfds.features.FeaturesDict."""
    import tensorflow_datasets as tfds  # slow to import; training does not need it

    fields = dict(manifest.fields)
    if manifest.text_table:
        fields["text_row"] = {"shape": [], "dtype": "int32"}
        del fields["text"]
    features = {"id": tfds.features.Text(), "caption": tfds.features.Text()}
    for name, field in fields.items():
        features[name] = tfds.features.Tensor(
            shape=tuple(field["shape"]), dtype=np.dtype(field["dtype"]), encoding="bytes"
        )
    return tfds.features.FeaturesDict(features)


def _shard_lengths(manifest: Manifest) -> list[int]:
    """Records in each shard by number; a shard without records has no file, but a number."""
    lengths = {shard["name"]: shard["records"] for shard in manifest.shards}
    last = max(int(name.split("-")[1].split(".")[0]) for name in lengths)
    return [lengths.get(shard_paths(Path(), i)[0].name, 0) for i in range(last + 1)]


def write_tfds_metadata(folder: Path, name: str) -> None:
    """Describe the splits in `folder` to TFDS: dataset_info.json and features.json.

    The records do not change. TFDS does not read text features in a text table; it reads
    `text_row`, the row in SPLIT/text_table.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import dataset_info, naming

    manifests = {
        split: read_manifest(folder / split)
        for split in SPLITS
        if (folder / split / MANIFEST).exists()
    }
    splits = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=_shard_lengths(manifest),
            num_bytes=sum(shard["bytes"] for shard in manifest.shards),
            filename_template=naming.ShardedFileTemplate(
                data_dir=folder,
                template="{SPLIT}/part-{SHARD_INDEX}.{FILEFORMAT}",
                dataset_name=name,
                split=split,
                filetype_suffix="array_record",
            ),
        )
        for split, manifest in manifests.items()
    ]
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


def _read_lists(
    corpus: str, manual_dir: Path, splits: Sequence[str] | None, options: dict
) -> dict[str, list | Path | None]:
    """The lists of the splits to build: rows, or TSV files.

    Raises:
      CorpusError: unknown names, or files that do not fit the corpus.
    """
    if corpus not in CORPORA:
        raise CorpusError(f"corpus {corpus!r} is not one of {', '.join(CORPORA)}")
    if not manual_dir.is_dir():
        raise CorpusError(f"{manual_dir}: no such folder (manual_dir)")
    known = inspect.signature(CORPORA[corpus]).parameters
    duration = options.pop("duration", None)
    if "duration" in known and duration is not None:
        options["duration"] = duration
    if unknown := options.keys() - known.keys():
        raise CorpusError(f"{corpus} takes no --{min(unknown)}")
    found = CORPORA[corpus](manual_dir, **options)
    for split in splits or found:
        if split not in found:
            raise CorpusError(f"{corpus} in {manual_dir} has no split {split!r}")
        if found[split] == []:
            raise CorpusError(
                f"{manual_dir}: {corpus} has no clips for split {split}: name others in --splits"
            )
    return {split: found[split] for split in SPLITS if split in (splits or found)}


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
      manual_dir: folder of the downloaded files.
      out: the data_dir of TFDS.
      splits: some of train, val, test; None builds those that the corpus has.
      options: of the corpus (see its function in `vcm_jax.data.corpora`).
      codec: codec folder; None fits the linear codec on train, for all splits.
      settings: of `vcm_jax.features.extract.extract`.

    Raises:
      CorpusError, ValueError: the files do not fit the corpus, or a split has no clips.
    """
    manual_dir, folder = Path(manual_dir), Path(out) / corpus / TFDS_VERSION
    options = {key: value for key, value in (options or {}).items() if value is not None}
    options["duration"] = settings.get("duration")
    lists = _read_lists(corpus, manual_dir, splits, options)
    videos = corpus == "vggsound" or (
        corpus == "folder" and bool(list_files(manual_dir, VIDEO_SUFFIXES))
    )
    train_codec = folder / "train" / "codec"
    if codec is None and "train" not in lists and not train_codec.exists():
        raise CorpusError(f"the codec comes from split train, which does not exist: {train_codec}")
    for split, captions in lists.items():
        if isinstance(captions, list):
            rows, captions = captions, folder / f"{split}.tsv"
            _write_list(captions, rows)
        shared = codec if codec is not None or split == "train" else train_codec
        print(f"{corpus}, {split}:", flush=True)
        extraction.extract(
            folder / split,
            **{"videos" if videos else "sounds": manual_dir},
            captions=captions,
            codec=shared,
            **settings,
        )
    if all((folder / split / MANIFEST).exists() for split in lists):
        write_tfds_metadata(folder, corpus)
    return folder


def define_flags():
    extraction.define_flags(sources=False)
    heading("Corpus")
    flags.DEFINE_string("manual_dir", None, "Folder of the downloaded files.", required=True)
    flags.DEFINE_list("splits", None, "Some of train, val, test. By default all that exist.")
    flags.DEFINE_string("val_list", None, "vggsound: TSV whose first column has the val ids.")
    flags.DEFINE_integer(
        "val_size", None, "vggsound: number of train clips used for val (2048).", lower_bound=0
    )
    flags.DEFINE_string("pattern", None, "audiocaps: file names, e.g. {youtube_id}_{start_time}.")


def main(args, rest):
    if len(rest) != 1:
        raise CorpusError(f"name one corpus: {', '.join(CORPORA)}")
    folder = build(
        rest[0],
        args.manual_dir,
        args.out,
        splits=args.splits,
        options={name: args[name].value for name in ("val_list", "val_size", "pattern")},
        **extraction.settings_from_flags(),
    )
    built = [folder / split for split in SPLITS if (folder / split / MANIFEST).exists()]
    return max((extraction.report(path, read_manifest(path)) for path in built), default=0)


if __name__ == "__main__":
    run(main, define_flags, positional="the corpus", memory_hint=extraction.MEMORY_HINT)

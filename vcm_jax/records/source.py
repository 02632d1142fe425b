"""Random access to a records folder, with checks of its contents."""

import operator

import numpy as np
from absl import logging
from array_record.python import array_record_data_source
from etils import epath

from vcm_jax.records.manifest import MANIFEST, hash_empty_text, read_manifest, row_hashes
from vcm_jax.records.schema import (
    EMPTY_TEXT,
    TEXT_TABLE,
    RecordError,
    deserialize,
    hash_row,
    latent_statistics,
    latent_sums,
)

CHECKED_CLIPS = 64  # training compares the statistics with so many clips when it starts


def locate(path: str, directory: str) -> epath.Path:
    """The folder that a data source names: its path as it is, or in `directory` (data.dir).

    Raises:
      RecordError: there is no such folder, or there are two.
    """
    here = epath.Path(path)
    if not directory or here.is_absolute():
        return here
    there = epath.Path(directory) / path
    found = [folder for folder in (there, here) if folder.exists()]
    if not found:
        raise RecordError(f"{path}: no such folder, neither as it is nor in data.dir {directory}")
    complete = [folder for folder in found if (folder / MANIFEST).exists()]
    if len(complete) == 2 and here.resolve() != there.resolve():
        raise RecordError(
            f"{path}: two folders of records, {here.resolve()} and {there.resolve()}: give the "
            "whole path of one of them"
        )
    return (complete or found)[0]


class RecordSource:
    """Random access to a records folder. Picklable; threads and processes may share it.

    Attributes:
      path: the folder, local or on a remote file system that etils.epath knows (gs://...).
      manifest: its Manifest.

    Raises:
      RecordError: the folder is not complete: it has no manifest or no records, or a shard is
        missing, cut off or not in the manifest.
    """

    def __init__(self, path):
        self.path = epath.Path(path)
        self.manifest = read_manifest(self.path)
        files = {shard["name"]: shard for shard in self.manifest.shards}
        shards = list(files)
        if self.manifest.text_table:
            files[TEXT_TABLE] = self.manifest.text_table
        there = {file.name: file for file in self.path.iterdir()}
        for name, file in files.items():
            if name not in there:
                raise RecordError(f"{self.path / name}: missing, the manifest lists it")
            size = there[name].stat().length
            if size != file["bytes"]:
                raise RecordError(
                    f"{self.path / name}: {size} bytes, the manifest says {file['bytes']}: "
                    "cut off or replaced"
                )
        if extra := sorted(n for n in there if n.endswith(".array_record") and n not in files):
            raise RecordError(f"{self.path / extra[0]}: not in the manifest")
        if not shards or not self.manifest.num_records:
            raise RecordError(f"{self.path}: no records")
        self._reader = self._open(shards, self.manifest.num_records)
        self._texts = None
        if self.manifest.text_table:
            self._texts = self._open([TEXT_TABLE], self.manifest.text_table["rows"])
            # A row is compared with its hash when it is first read, then the entry becomes None.
            self._row_hashes = row_hashes(self.manifest) or [None] * len(self._texts)

    def _open(self, names: list[str], count: int):
        try:
            # It is picklable: each process opens the files when it first reads from them.
            reader = array_record_data_source.ArrayRecordDataSource(
                [str(self.path / name) for name in names]
            )
        except Exception as error:  # its C++ code raises errors of many types
            raise RecordError(f"{self.path}: unreadable ({error})") from error
        if len(reader) != count:
            raise RecordError(f"{self.path}: {len(reader)} records, the manifest says {count}")
        return reader

    @property
    def empty_text(self) -> np.ndarray:
        """The text encoder's features of the empty text, (Tt, Dt) float32.

        Raises:
          RecordError: they are missing, damaged, or of another shape than the text features.
        """
        path = self.path / EMPTY_TEXT
        try:
            with path.open("rb") as file:
                features = np.load(file)
        except Exception as error:  # np.load raises errors of many types on damaged files
            raise RecordError(f"{path}: missing or damaged ({error})") from error
        wanted = self.manifest.fields.get("text", {}).get("shape", list(features.shape))
        if features.dtype != np.float32 or list(features.shape) != wanted:
            raise RecordError(
                f"{path}: {features.dtype} {features.shape}, needed is float32 {tuple(wanted)}"
            )
        if not np.isfinite(features).all():
            raise RecordError(f"{path}: the features are not finite")
        if self.manifest.empty_text not in (None, hash_empty_text(features)):
            raise RecordError(f"{path}: not the features that were written")
        return features

    def __len__(self) -> int:
        return self.manifest.num_records

    def __getitem__(self, index: int) -> dict:
        """Record `index` with the fields that `serialize` names; `text` is always there.

        Raises:
          IndexError: no such record.
          RecordError: damaged, or different from the manifest; names the folder and the record.
        """
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        try:
            record = deserialize(self._reader[index])
            if self._texts is not None:
                shape = self.manifest.fields["text"]["shape"]
                data = self._read_text(int(record.pop("text_row")))
                record["text"] = np.frombuffer(data, np.float16).reshape(shape)
        except Exception as error:  # the C++ reader has no error type for damaged bytes
            raise RecordError(f"{self.path}, record {index}: {error}") from error
        for name, field in self.manifest.fields.items():
            if name not in record or list(record[name].shape) != field["shape"]:
                found = record[name].shape if name in record else "missing"
                raise RecordError(
                    f"{self.path}, record {index}: {name} is {found}, the manifest says "
                    f"{tuple(field['shape'])}"
                )
        return record

    def _read_text(self, row: int) -> bytes:
        data = self._texts[row]
        if self._row_hashes[row] not in (None, hash_row(data)):
            raise RecordError(f"row {row} of {TEXT_TABLE} is not the one that was written")
        self._row_hashes[row] = None
        return data

    def check_statistics(self, count: int = CHECKED_CLIPS) -> None:
        """Compare the manifest's latent statistics with those of some clips, evenly chosen.

        Damaged clips among them are passed over, as in training.

        Means may be off by ten standard errors (from the spread between the clips) and a tenth of
        the standard deviation, stds by a factor of 2: more than chance does, less than latents of
        another codec or scale. All clips together must agree to 0.1%.

        Raises:
          RecordError: they do not fit the records, or all the clips are damaged.
        """
        count = min(count, len(self))
        chosen = np.linspace(0, len(self) - 1, count).round().astype(int)
        sums = []
        for i in chosen:
            try:
                clip = self[i]
            except RecordError as error:
                logging.warning("damaged record passed over: %s", error)
                damaged = error
                continue
            sums.append(latent_sums(clip["latent_mean"], clip["latent_std"]))
        if not sums:
            raise RecordError(f"all {count} records that were read are damaged, as in: {damaged}")
        sums, count = np.stack(sums), len(sums)
        mean, std = latent_statistics(sums.sum(axis=0))
        told_mean = np.array(self.manifest.latent_mean)
        told_std = np.array(self.manifest.latent_std)
        scale = np.maximum(told_std, 1e-6)
        if count == len(self):
            good = (abs(mean - told_mean) <= 1e-3 * scale) & (abs(std - told_std) <= 1e-3 * scale)
        else:
            error = (sums[:, 1] / sums[:, 0]).std(axis=0) / np.sqrt(count)
            ratio = np.maximum(std, 1e-6) / scale
            good = (abs(mean - told_mean) <= 10 * error + 0.1 * scale) & (abs(np.log2(ratio)) <= 1)
        if not good.all():
            worst = int(np.argmin(good))
            raise RecordError(
                f"{self.path / MANIFEST}: its latent statistics do not fit the records: channel "
                f"{worst} has mean {told_mean[worst]:.4g}, std {told_std[worst]:.4g} there, "
                f"{mean[worst]:.4g}, {std[worst]:.4g} over {count} records: extract again"
            )

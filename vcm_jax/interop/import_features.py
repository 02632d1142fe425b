"""Converts MMAudio's extracted features, memory-mapped tensors and a TSV, to a records folder.

A folder of features holds `meta.json` and one raw little-endian file for each tensor, as
tensordict writes them: `mean` and `std` (`N L C`), `text_features`, and with video
`clip_features` and `sync_features`. The TSV has N rows in the same order, with the columns `id` and
`label` or `caption`. If an id occurs again (a row for each segment of a long sound), the later ones
get #2, #3, ...

If a conversion is interrupted, rerun it: it resumes after the last complete shard.
"""

import dataclasses
import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from vcm_jax.atomic import write_json
from vcm_jax.claim import claim, hold
from vcm_jax.cli import LEFT_OUT
from vcm_jax.codec import copy_codec, load_codec
from vcm_jax.hashes import short_hash
from vcm_jax.interop.memmaps import FeatureError, Tensor, open_tensors
from vcm_jax.interop.state_dict import list_few, read_state_dict
from vcm_jax.media.tables import read_table, write_table
from vcm_jax.records.manifest import Manifest, write_empty_text, write_manifest
from vcm_jax.records.schema import (
    VERSION,
    RecordError,
    describe_fields,
    deserialize,
    latent_statistics,
    latent_sums,
    serialize,
    write_shard,
)
from vcm_jax.records.sequence import SequenceConfig

_SHARD = 1024  # records in a file, which is what an interrupted conversion repeats at most
_VIDEO_WIDTHS = {"clip_dim": 1024, "sync_dim": 768}  # MMAudio's, for sets without video


def read_rows(path) -> list[tuple[str, str]]:
    """[(id, caption)] of a TSV as pandas writes it, with unique ids; captions may be labels.

    Raises:
      FeatureError: other columns, or a row without an id.
      TableError: the file cannot be read, or a row has too many or too few fields.
    """
    header, rows = read_table(path)
    column = next((name for name in ("caption", "label") if name in header), None)
    if "id" not in header or column is None:
        raise FeatureError(
            f"{path}: its columns are {', '.join(map(repr, header))}; needed are 'id' and "
            "'caption' (or 'label'), separated by tabs"
        )
    for line, row in rows:
        if not row["id"]:
            raise FeatureError(f"{path}: line {line} has no id")
    ids = _unique([row["id"] for _, row in rows])
    return [(name, row[column]) for name, (_, row) in zip(ids, rows, strict=True)]


def _unique(ids: list[str]) -> list[str]:
    """Ids with #2, #3, ... after those that occur again; numbers that are taken are skipped."""
    taken, count, unique = set(ids), Counter(), []
    for name in ids:
        count[name] += 1
        candidate = name
        while count[name] > 1 and (candidate := f"{name}#{count[name]}") in taken:
            count[name] += 1
        taken.add(candidate)
        unique.append(candidate)
    return unique


def read_empty_text(path) -> np.ndarray:
    """The text encoder's features of "" `Tt Dt`, float32.

    Args:
      path: MMAudio's weights, which hold them, or a .npy file (`empty_text.npy` of other records).

    Raises:
      FeatureError, StateDictError: a file of another kind, or one without these features.
    """
    path = Path(path)
    if path.suffix == ".npy":
        try:
            return np.load(path).astype(np.float32)
        except (OSError, ValueError, EOFError) as error:
            raise FeatureError(f"{path}: unreadable ({error})") from None
    state_dict = read_state_dict(path)
    if "empty_string_feat" not in state_dict:
        raise FeatureError(
            f"{path}: no empty_string_feat among its tensors ({list_few(state_dict)})"
        )
    return state_dict["empty_string_feat"].astype(np.float32)


def _check_fit(tensors: dict[str, Tensor], codec, duration: float, codec_path) -> SequenceConfig:
    """The lengths that the codec and the tensors share.

    Raises:
      FeatureError: they differ.
    """
    grid = {k: getattr(codec, k) for k in ("sample_rate", "hop", "latent_downsample")}
    text_len = tensors["text"].shape[1]
    sequence = SequenceConfig(duration=duration, text_seq_len=text_len, **grid)
    wanted = {
        "latent_mean": (sequence.latent_seq_len, codec.latent_dim),
        "clip": (sequence.clip_seq_len, None),
        "sync": (sequence.sync_seq_len, None),
    }
    for field, (length, width) in wanted.items():
        if field in tensors:
            found = tensors[field].shape[1:]
            if found != (length, width or found[1]):
                whose = f"the codec {codec_path}" if width else "MMAudio's frame rates"
                raise FeatureError(
                    f"{tensors[field].path}: {found[0]} x {found[1]} for each clip, but "
                    f"{duration:g} s with {whose} give {length} x {width or found[1]}"
                )
    return sequence


def _check_empty_text(empty_text: np.ndarray, path, tensors: dict[str, Tensor]) -> None:
    """Raises FeatureError if the features are not such as those of the captions."""
    wanted = tensors["text"].shape[1:]
    if empty_text.shape != wanted:
        raise FeatureError(
            f"{path}: features of the empty text are {empty_text.shape}, those of the captions "
            f"{wanted}"
        )
    if not np.isfinite(empty_text).all():
        raise FeatureError(f"{path}: features of the empty text are not finite")


def encoders_spec(tensors: dict[str, Tensor]) -> dict:
    """Manifest.encoders of MMAudio's CLIP and Synchformer, without hashes of their weights."""
    widths = {f"{k}_dim": tensors[k].shape[2] for k in ("clip", "sync", "text") if k in tensors}
    return {"name": "mmaudio", "version": 1} | _VIDEO_WIDTHS | widths


def _convert_shard(path: Path, tensors, rows, first: int) -> None:
    """Writes the records of `rows`, which begin with number `first`, and last a JSON summary."""
    summary = {"records": 0, "bytes": 0, "fields": {}, "failures": []}
    sums, digest = 0.0, hashlib.sha256()

    def packed():
        nonlocal sums
        streams = [tensor.rows(first, first + len(rows)) for tensor in tensors.values()]
        for (name, caption), *arrays in zip(rows, *streams, strict=True):
            record = {"id": name, "caption": caption} | dict(zip(tensors, arrays, strict=True))
            try:
                data = serialize(record)
            except RecordError as error:
                summary["failures"].append((name, str(error)))
                continue
            sums = sums + latent_sums(record["latent_mean"], record["latent_std"])
            summary["fields"] = summary["fields"] or describe_fields(deserialize(data))
            summary["records"] += 1
            digest.update(data)
            yield data

    write_shard(path, packed())
    if summary["records"]:
        summary["bytes"] = path.stat().st_size
    else:
        path.unlink()
    summary |= {"hash": digest.hexdigest()[:16], "sums": np.asarray(sums).tolist()}
    write_json(path.with_suffix(".json"), summary, indent=None)


def convert(folder, tsv, codec, empty_text, out, duration: float = 8.0) -> int:
    """Checks everything, then converts shard by shard; the manifest comes last.

    Args:
      folder: meta.json and the files of the tensors.
      tsv: path of the table of ids and captions.
      codec: folder of the codec that made the latents.
      empty_text: path of MMAudio's weights, or of a .npy file (see `read_empty_text`).
      out: records folder to write.
      duration: seconds of each clip.

    Returns:
      The exit code of a command: LEFT_OUT if some clips were left out.

    Raises:
      ValueError: something does not fit, or no clip can be used.
    """
    tensors, rows = open_tensors(folder), read_rows(tsv)
    count = tensors["latent_mean"].shape[0]
    if len(rows) != count:
        raise FeatureError(
            f"{tsv} has {len(rows)} rows, {folder} {count} clips: they belong together row by row "
            "and must be of one set"
        )
    loaded, text = load_codec(codec), read_empty_text(empty_text)
    sequence = _check_fit(tensors, loaded, duration, codec)
    _check_empty_text(text, empty_text, tensors)
    spec = {key: getattr(loaded, key) for key in ("name", "fingerprint", "latent_dim")}
    out = Path(out)
    settings = {
        "version": VERSION,
        "folder": str(Path(folder).resolve()),
        "tensors": {name: [list(t.shape), t.dtype.name] for name, t in tensors.items()},
        "rows": short_hash(json.dumps(rows).encode()),
        "empty_text": short_hash(text.tobytes()),
        "codec": spec,
        "sequence": dataclasses.asdict(sequence),
    }
    with hold(out):
        claim(out, settings)
        paths = [out / f"part-{i:05d}.array_record" for i in range(-(-count // _SHARD))]
        with tqdm(total=count, desc="Converting", unit="clip") as bar:
            for i, path in enumerate(paths):
                shard = rows[i * _SHARD : (i + 1) * _SHARD]
                if not path.with_suffix(".json").exists():
                    _convert_shard(path, tensors, shard, i * _SHARD)
                bar.update(len(shard))
        manifest = _finish(out, paths, codec, text, sequence, encoders_spec(tensors), spec)
    left_out = manifest.num_failures
    print(
        f"{out}: {manifest.num_records} records, {left_out} clips left out"
        + (" (listed in failures.tsv)" if left_out else "")
    )
    return LEFT_OUT if left_out else 0


def _finish(out, paths, codec_folder, empty_text, sequence, encoders, codec) -> Manifest:
    """Writes what belongs to all shards: failures, codec, empty text, and last the manifest."""
    summaries = [json.loads(path.with_suffix(".json").read_text()) for path in paths]
    failures = [failure for summary in summaries for failure in summary["failures"]]
    used = [(path, summary) for path, summary in zip(paths, summaries) if summary["records"]]
    if not used:
        shutil.rmtree(out)
        raise FeatureError(f"no clip can be used, the first: {failures[0][1]}")
    write_table(out / "failures.tsv", ("id", "reason"), failures)
    if not (out / "codec").exists():
        copy_codec(codec_folder, out / "codec")
    mean, std = latent_statistics(np.sum([summary["sums"] for _, summary in used], axis=0))
    manifest = Manifest(
        sequence=sequence,
        encoders=encoders,
        codec=codec,
        has_video="clip" in used[0][1]["fields"],
        num_records=sum(summary["records"] for _, summary in used),
        num_failures=len(failures),
        fields=used[0][1]["fields"],
        latent_mean=mean.tolist(),
        latent_std=std.tolist(),
        shards=[
            {"name": path.name, "records": summary["records"], "bytes": summary["bytes"]}
            for path, summary in used
        ],
        fingerprint=short_hash(*(summary["hash"].encode() for summary in summaries)),
        empty_text=write_empty_text(out, empty_text),
    )
    write_manifest(out, manifest)
    return manifest

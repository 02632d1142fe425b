"""MMAudio's extracted features (memory-mapped tensors and a TSV) to a records folder.

A folder of them holds `meta.json` and one raw little-endian file per tensor, as tensordict writes
them: `mean`, `std` (`N L C`), `text_features`, and with pictures `clip_features` and
`sync_features`. The TSV beside it has N rows in the same order: `id` and `label` or `caption`. An
id that comes again (a row per piece of a long sound) gets #2, #3, ...

A conversion that was stopped goes on where it was when it is started again.
"""

import dataclasses
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from vcm_jax.atomic import atomic_path
from vcm_jax.codec import copy_codec, load_codec
from vcm_jax.interop.state_dict import list_few, read_state_dict
from vcm_jax.media.clips import printable
from vcm_jax.media.tables import TableError, read_table
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

_SHARD = 1024  # records per file: what a stopped conversion repeats at most
_SETTINGS = "settings.json"  # in the records folder: what the parts there were made from
_DTYPES = {
    "torch.float32": np.dtype("<f4"),
    "torch.float16": np.dtype("<f2"),
    "torch.bfloat16": np.dtype(jnp.bfloat16),
}
_FIELDS = {  # tensor -> field of a record
    "mean": "latent_mean",
    "std": "latent_std",
    "text_features": "text",
    "clip_features": "clip",
    "sync_features": "sync",
}
_VIDEO = ("clip_features", "sync_features")
_VIDEO_WIDTHS = {"clip_dim": 1024, "sync_dim": 768}  # MMAudio's, where a set has no pictures


class FeatureError(ValueError):
    """Features that cannot be converted; one line that names the file and what would be right."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A memory-mapped tensor `N ...` on disk, read row by row."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype

    def rows(self, first: int, last: int) -> Iterator[np.ndarray]:
        """Rows `first` ... `last` - 1; one at a time is in memory."""
        size = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        with open(self.path, "rb") as file:
            file.seek(first * size)
            for _ in range(first, last):
                yield np.frombuffer(file.read(size), self.dtype).reshape(self.shape[1:])


def open_tensors(folder) -> dict[str, Tensor]:
    """The tensors of a folder that tensordict wrote, by the fields of a record.

    Raises:
      FeatureError: not such a folder, tensors missing or of other shapes, files cut off.
    """
    folder = Path(folder)
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text())
        described = {k: v for k, v in meta.items() if isinstance(v, dict) and "dtype" in v}
        shapes = {name: tuple(map(int, v["shape"])) for name, v in described.items()}
    except FileNotFoundError:
        raise FeatureError(
            f"{folder}: not a folder of memory-mapped features (it has no meta.json)"
        ) from None
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise FeatureError(f"{path}: damaged ({type(error).__name__}: {error})") from None
    video = [name for name in _VIDEO if name in shapes]
    missing = [name for name in _FIELDS if name not in shapes and (video or name not in _VIDEO)]
    if missing:
        raise FeatureError(
            f"{path}: no {list_few(missing)}; it has {list_few(shapes) or 'nothing'}"
        )
    tensors, count = {}, shapes["mean"][:1]
    for name, field in _FIELDS.items():
        if name not in shapes:
            continue
        shape, dtype = shapes[name], described[name]["dtype"]
        if len(shape) != 3 or shape[:1] != count:
            raise FeatureError(
                f"{path}: {name} has shape {shape}, wanted is (N, length, channels) with the N of "
                f"mean, whose shape is {shapes['mean']}"
            )
        if dtype not in _DTYPES:
            raise FeatureError(f"{path}: {name} is {dtype}, known are {', '.join(_DTYPES)}")
        tensors[field] = Tensor(folder / f"{name}.memmap", shape, _DTYPES[dtype])
    if not count[0]:
        raise FeatureError(f"{path}: no clips (mean has shape {shapes['mean']})")
    if tensors["latent_mean"].shape != tensors["latent_std"].shape:
        raise FeatureError(f"{path}: mean {shapes['mean']} and std {shapes['std']} differ in shape")
    for tensor in tensors.values():
        if not tensor.path.is_file():
            raise FeatureError(f"{tensor.path}: no such file, {path.name} lists it")
        size, wanted = (
            tensor.path.stat().st_size,
            int(np.prod(tensor.shape)) * tensor.dtype.itemsize,
        )
        if size != wanted:
            raise FeatureError(
                f"{tensor.path}: {size} bytes, {wanted} were expected for {tensor.shape} of "
                f"{tensor.dtype.name}: cut off, or of another set"
            )
    return tensors


def read_rows(path) -> list[tuple[str, str]]:
    """[(id, caption)] of a TSV as pandas writes it, ids made unique; captions may be labels.

    Raises:
      FeatureError: unreadable, other columns, or a row without an id.
    """
    try:
        header, table = read_table(path)
    except TableError as error:
        raise FeatureError(str(error)) from None
    column = next((name for name in ("caption", "label") if name in header), None)
    if "id" not in header or column is None:
        raise FeatureError(
            f"{path}: its columns are {', '.join(map(repr, header))}; needed are 'id' and "
            "'caption' (or 'label'), separated by tabs"
        )
    for line, row in table:
        if not row["id"]:
            raise FeatureError(f"{path}, line {line}: no id")
        if printable(row[column]) != row[column]:
            raise FeatureError(f"{path}, line {line}: the {column} is not UTF-8")
    ids = _unique([printable(row["id"]) for _, row in table])
    return list(zip(ids, [row[column] for _, row in table], strict=True))


def _unique(ids: list[str]) -> list[str]:
    """Ids with #2, #3, ... behind those that come again; numbers that are taken are passed over."""
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
      ValueError: neither, or without these features.
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


def _check_fit(tensors: dict[str, Tensor], codec, empty_text, duration: float, args):
    """The SequenceConfig that the codec and the tensors share.

    Raises:
      FeatureError: they differ.
    """
    grid = {k: getattr(codec, k) for k in ("sample_rate", "hop", "latent_downsample")}
    text = tensors["text"].shape[1:]
    sequence = SequenceConfig(duration=duration, text_seq_len=text[0], **grid)
    wanted = {
        "latent_mean": (sequence.latent_seq_len, codec.latent_dim),
        "clip": (sequence.clip_seq_len, None),
        "sync": (sequence.sync_seq_len, None),
    }
    for field, (length, width) in wanted.items():
        if field in tensors:
            found = tensors[field].shape[1:]
            if found != (length, width or found[1]):
                whose = f"the codec {args.codec}" if width else "MMAudio's frame rates"
                raise FeatureError(
                    f"{tensors[field].path}: {found[0]} x {found[1]} per clip, {duration:g} s with "
                    f"{whose} give {length} x {width or found[1]}"
                )
    if empty_text.shape != text:
        raise FeatureError(
            f"{args.empty_text}: features of the empty text are {empty_text.shape}, those of the "
            f"captions {text}"
        )
    if not np.isfinite(empty_text).all():
        raise FeatureError(f"{args.empty_text}: features of the empty text are not finite")
    return sequence


def encoders_spec(tensors: dict[str, Tensor]) -> dict:
    """Manifest.encoders: MMAudio's CLIP and Synchformer, whose weights are not at hand."""
    widths = {f"{k}_dim": tensors[k].shape[2] for k in ("clip", "sync", "text") if k in tensors}
    return {"name": "mmaudio", "version": 1} | _VIDEO_WIDTHS | widths


def _convert_part(path: Path, tensors, rows, first: int) -> None:
    """Writes the records of `rows` (those from `first` on) and, last, PATH.json about them."""
    sums, failures, fields, digest, count = 0.0, [], {}, hashlib.sha256(), 0

    def packed():
        nonlocal sums, fields, count
        streams = [tensor.rows(first, first + len(rows)) for tensor in tensors.values()]
        for (name, caption), *arrays in zip(rows, *streams, strict=True):
            record = {"id": name, "caption": caption} | dict(zip(tensors, arrays, strict=True))
            try:
                data = serialize(record)
            except RecordError as error:
                failures.append((name, str(error)))
                continue
            sums = sums + latent_sums(record["latent_mean"], record["latent_std"])
            fields = fields or describe_fields(deserialize(data))
            digest.update(data)
            count += 1
            yield data

    write_shard(path, packed())
    content = {"records": count, "bytes": path.stat().st_size, "hash": digest.hexdigest()[:16]}
    content |= {"fields": fields, "sums": np.asarray(sums).tolist(), "failures": failures}
    if not count:
        path.unlink()
    with atomic_path(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(content) + "\n")


def _claim(out: Path, settings: dict) -> None:
    """Notes what the records are made from; refuses a folder that holds something else."""
    path = out / _SETTINGS
    if path.exists():
        if json.loads(path.read_text()) != settings:
            raise FeatureError(f"--out={out}: holds records made from something else")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FeatureError(f"--out={out} is there already: give another folder")
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(settings, indent=1) + "\n")


def add_arguments(parser) -> None:
    """The subcommand's arguments."""
    parser.add_argument("folder", help="meta.json and *.memmap")
    parser.add_argument("--tsv", required=True, help="id and label or caption, in the same order")
    parser.add_argument("--codec", required=True, help="codec folder that made the latents")
    parser.add_argument(
        "--empty_text",
        required=True,
        help='features of the text "": in MMAudio\'s weights (.pth), or a .npy file',
    )
    parser.add_argument("--duration", type=float, default=8.0, help="seconds per clip (8)")
    parser.add_argument("--out", required=True, help="records folder to write")


def run(args) -> None:
    """Checks everything, then converts part by part; the manifest comes last.

    Raises:
      ValueError: something does not fit, or no clip can be used.
    """
    tensors, rows = open_tensors(args.folder), read_rows(args.tsv)
    count = tensors["latent_mean"].shape[0]
    if len(rows) != count:
        raise FeatureError(
            f"{args.tsv} has {len(rows)} rows, {args.folder} {count} clips: they belong together "
            "row by row, and must be of one set"
        )
    codec, empty_text = load_codec(args.codec), read_empty_text(args.empty_text)
    sequence = _check_fit(tensors, codec, empty_text, args.duration, args)
    spec = {key: getattr(codec, key) for key in ("name", "fingerprint", "latent_dim")}
    out = Path(args.out)
    _claim(out, {
        "version": VERSION,
        "folder": str(Path(args.folder).resolve()),
        "tensors": {name: [list(t.shape), t.dtype.name] for name, t in tensors.items()},
        "rows": hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16],
        "empty_text": hashlib.sha256(empty_text.tobytes()).hexdigest()[:16],
        "codec": spec,
        "sequence": dataclasses.asdict(sequence),
    })  # fmt: skip

    paths = [out / f"part-{i:05d}.array_record" for i in range(-(-count // _SHARD))]
    with tqdm(total=count, desc="Converting", unit="clip") as bar:
        for i, path in enumerate(paths):
            part = rows[i * _SHARD : (i + 1) * _SHARD]
            if not path.with_suffix(".json").exists():
                _convert_part(path, tensors, part, i * _SHARD)
            bar.update(len(part))
    manifest = _finish(out, paths, args.codec, empty_text, sequence, encoders_spec(tensors), spec)
    left_out = manifest.num_failures
    print(
        f"{out}: {manifest.num_records} records, {left_out} clips left out"
        + (" (listed in failures.tsv)" if left_out else "")
    )


def _finish(out, paths, codec_folder, empty_text, sequence, encoders, codec) -> Manifest:
    """Writes all that belongs to the parts: failures, codec, empty text, and last the manifest."""
    parts = [json.loads(path.with_suffix(".json").read_text()) for path in paths]
    failures = [failure for part in parts for failure in part["failures"]]
    used = [(path, part) for path, part in zip(paths, parts, strict=True) if part["records"]]
    if not used:
        shutil.rmtree(out)
        raise FeatureError(f"no clip can be used, the first: {failures[0][1]}")
    with atomic_path(out / "failures.tsv") as temporary:
        lines = ["\t".join(" ".join(text.split()) for text in row) for row in failures]
        temporary.write_text("\n".join(["id\treason", *lines]) + "\n", encoding="utf-8")
    if not (out / "codec").exists():
        copy_codec(codec_folder, out / "codec")
    mean, std = latent_statistics(np.sum([part["sums"] for _, part in used], axis=0))
    manifest = Manifest(
        sequence=sequence,
        encoders=encoders,
        codec=codec,
        has_video="clip" in used[0][1]["fields"],
        num_records=sum(part["records"] for _, part in used),
        num_failures=len(failures),
        fields=used[0][1]["fields"],
        latent_mean=mean.tolist(),
        latent_std=std.tolist(),
        shards=[
            {"name": path.name, "records": part["records"], "bytes": part["bytes"]}
            for path, part in used
        ],
        fingerprint=hashlib.sha256("".join(p["hash"] for p in parts).encode()).hexdigest()[:16],
        empty_text=write_empty_text(out, empty_text),
    )
    write_manifest(out, manifest)
    return manifest

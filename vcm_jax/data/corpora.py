"""Public corpora as they are published: which file is which clip of which split.

Each reader takes the folder of the downloaded files and returns {split: rows}; a row is (id,
caption, file inside the folder, start in seconds).
"""

import hashlib
import json
from collections import defaultdict
from pathlib import Path

from vcm_jax.media.clips import (
    SOUND_SUFFIXES,
    VIDEO_SUFFIXES,
    composed,
    list_files,
    printable,
)
from vcm_jax.media.read import MediaError, probe
from vcm_jax.media.tables import TableError, read_rows, read_table

Row = tuple[str, str, str, float]
_WAVCAPS = {  # list: (prefix of its ids, words of which one is in the path of its files)
    "fsd_final.json": ("freesound", ("freesound", "fsd")),
    "bbc_final.json": ("bbc", ("bbc",)),
    "as_final.json": ("audioset", ("audioset", "as_")),
}


class CorpusError(ValueError):
    """A folder that does not hold the corpus as it is published; the message is one line."""


class _Files:
    """The sound and video files of a folder, by stem and by path."""

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise CorpusError(f"{folder}: no such folder (manual_dir)")
        self.folder, self.by_stem, self.by_path = folder, defaultdict(list), {}
        for path in map(printable, list_files(folder, VIDEO_SUFFIXES + SOUND_SUFFIXES)):
            self.by_stem[composed(Path(path).stem)].append(path)
            self.by_path[composed(path)] = path

    def named(self, *stems: str, words: tuple[str, ...] = ()) -> str:
        """Find the file with one of these stems; a file with one of the `words` in its path wins.

        Returns:
          Its path, or the first stem if there is no file: extraction then reports it as missing.
        """
        for stem in stems:
            found = self.by_stem.get(composed(stem), [])
            fitting = [p for p in found if any(word in p.lower() for word in words)]
            if found:
                return (fitting or found)[0]
        return stems[0]


def _read_csv(path: Path, columns: tuple[str, ...]) -> list[dict]:
    """Read the rows of a CSV file that has these columns."""
    header, rows = _read(read_table, path)
    missing = [name for name in columns if name not in header]
    if missing:
        raise CorpusError(f"{path}: no column {missing[0]!r}; it has {', '.join(header)}")
    return [row for _, row in rows]


def _read(function, path: Path):
    if not path.is_file():
        raise CorpusError(f"{path}: no such file")
    try:
        return function(path, "," if path.suffix == ".csv" else "\t")
    except TableError as error:
        raise CorpusError(str(error)) from None


def vggsound(
    folder: Path, *, val_list: Path | None = None, val_size: int = 2048
) -> dict[str, list[Row]]:
    """VGGSound: vggsound.csv and files ID_SSSSSS.mp4 anywhere in the folder.

    vggsound.csv has the columns id, start, label and split, but no header and no validation split.
    The validation split is taken out of train: the ids (file stems) in the first column of
    `val_list`, a TSV with a header such as MMAudio's, or else the `val_size` ids whose SHA-256 is
    smallest, whether or not their files exist.
    """
    path, files = folder / "vggsound.csv", _Files(folder)
    splits = {"train": [], "val": [], "test": []}
    for line, row in _read(read_rows, path):
        if len(row) != 4:
            raise CorpusError(
                f"{path}, line {line}: {len(row)} fields, needed are id, start, label, split"
            )
        youtube_id, start, label, split = row
        if not start.isdecimal():
            raise CorpusError(f"{path}, line {line}: start {start!r} is no whole number")
        if split not in ("train", "test"):
            raise CorpusError(f"{path}, line {line}: split {split!r} is not train or test")
        clip_id = f"{youtube_id}_{int(start):06d}"
        splits[split].append((clip_id, label, files.named(clip_id), 0.0))
    ids = [row[0] for row in splits["train"]]
    if val_list is not None:
        header, rows = _read(read_table, Path(val_list))
        chosen = {row[header[0]] for _, row in rows}
        if unknown := chosen - set(ids):
            raise CorpusError(f"{val_list}: {min(unknown)!r} is not among the train rows of {path}")
    else:
        chosen = set(sorted(ids, key=_sha256)[:val_size])
    if len(chosen) >= len(ids):
        raise CorpusError(
            f"{path}: {len(ids)} train rows, {len(chosen)} of them for validation: give --val_list "
            "or a smaller --val_size"
        )
    splits["val"] = [row for row in splits["train"] if row[0] in chosen]
    splits["train"] = [row for row in splits["train"] if row[0] not in chosen]
    return splits


def _sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def audiocaps(folder: Path, *, pattern: str | None = None) -> dict[str, list[Row]]:
    """AudioCaps: {train,val,test}.csv and sounds named YOUTUBEID_START, YOUTUBEID or AUDIOCAP_ID.

    `pattern` describes other file names, for example "{youtube_id}_{start_time}". Ids are
    YOUTUBEID_START; #2, #3, ... are appended for further captions of a clip.
    """
    files, splits = _Files(folder), {}
    columns = ("audiocap_id", "youtube_id", "start_time", "caption")
    patterns = ("{youtube_id}_{start_time}", "{youtube_id}", "{audiocap_id}")
    try:
        (pattern or "").format(**dict.fromkeys(columns))
    except (KeyError, IndexError, ValueError):
        raise CorpusError(f"--pattern={pattern}: it may name {', '.join(columns)}") from None
    for split in ("train", "val", "test"):
        rows = []
        for row in _read_csv(folder / f"{split}.csv", columns):
            stems = [p.format(**row) for p in ((pattern,) if pattern else patterns)]
            clip_id = patterns[0].format(**row)
            rows.append((clip_id, row["caption"], files.named(*stems), 0.0))
        splits[split] = _number(rows)
    return splits


def clotho(folder: Path, *, duration: float = 8.0) -> dict[str, list[Row]]:
    """Clotho: clotho_captions_{development,validation,evaluation}.csv and folders of these names.

    Sounds of 15 to 30 s are split into consecutive segments of `duration` seconds. Each segment
    gives a row for every caption: ids are STEM@SECOND, with #2 ... #5 for the further captions.
    """
    files, splits = _Files(folder), {}
    captions = tuple(f"caption_{i}" for i in range(1, 6))
    names = {"train": "development", "val": "validation", "test": "evaluation"}
    for split, name in names.items():
        rows = []
        path = folder / f"clotho_captions_{name}.csv"
        for row in _read_csv(path, ("file_name", *captions)):
            file = f"{name}/{row['file_name']}"
            file = files.by_path.get(composed(file), file)
            try:
                segments = max(1, int((probe(folder / file).duration + 1e-3) // duration))
            except MediaError:
                segments = 1  # extraction reports the error
            stem = Path(row["file_name"]).stem
            for start in (segment * duration for segment in range(segments)):
                clip_id = f"{stem}@{start:g}"
                rows += [(clip_id, row[column], file, start) for column in captions]
        splits[split] = _number(rows)
    return splits


def wavcaps(folder: Path) -> dict[str, list[Row]]:
    """WavCaps: any of fsd_final.json, bbc_final.json and as_final.json, and sounds anywhere.

    All clips are for training. Ids are SUBSET/ID, where SUBSET is freesound, bbc or audioset. If
    files of several subsets have the same name, the path tells them apart: it contains freesound
    (or fsd), bbc or audioset.
    """
    files, rows = _Files(folder), []
    found = [folder / path for path in list_files(folder, tuple(_WAVCAPS))]
    found = [path for path in found if path.name in _WAVCAPS]
    if not found:
        raise CorpusError(f"{folder}: none of {', '.join(_WAVCAPS)}")
    for path in found:
        subset, words = _WAVCAPS[path.name]
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))["data"]
            for entry in entries:
                clip_id = str(entry["id"])
                stem = clip_id.removesuffix(".wav").removesuffix(".flac")
                file = files.named(stem, words=words)
                rows.append((f"{subset}/{stem}", entry["caption"].strip(), file, 0.0))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            reason = f"no field {error}" if isinstance(error, KeyError) else error
            raise CorpusError(f"{path}: not a WavCaps list ({reason})") from error
    return {"train": rows}


def folder(folder: Path) -> dict[str, Path | None]:
    """Videos or sounds with {train,val,test}.tsv, or one other TSV for train, or no TSV.

    The TSVs have the columns id (file stem or relative path) and caption. They are returned in
    place of rows.
    """
    lists = {path.stem: path for path in sorted(folder.glob("*.tsv"))}
    splits = {name: lists[name] for name in ("train", "val", "test") if name in lists}
    if not splits and len(lists) > 1:
        raise CorpusError(
            f"{folder}: several TSVs ({', '.join(lists)}): call them train, val, test, or keep one"
        )
    return splits or {"train": next(iter(lists.values()), None)}


def _number(rows: list[Row]) -> list[Row]:
    """Append #2, #3, ... to the ids of a clip's second, third, ... caption."""
    seen = defaultdict(int)
    numbered = []
    for clip_id, *rest in rows:
        seen[clip_id] += 1
        suffix = f"#{seen[clip_id]}" if seen[clip_id] > 1 else ""
        numbered.append((clip_id + suffix, *rest))
    return numbered


CORPORA = {f.__name__: f for f in (vggsound, audiocaps, clotho, wavcaps, folder)}

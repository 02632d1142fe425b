"""Which clips there are: files of a folder, with or without a list of captions."""

import csv
import dataclasses
from collections import defaultdict
from pathlib import Path

from vcm_jax.media.names import SOUND_SUFFIXES as SOUND_SUFFIXES
from vcm_jax.media.names import VIDEO_SUFFIXES


class ListError(ValueError):
    """A folder or a list of captions that cannot be used at all; one line."""


@dataclasses.dataclass(frozen=True)
class Clip:
    """A clip's id, file, caption ("" if it has none), and where in the file it starts (seconds)."""

    id: str
    path: Path
    caption: str = ""
    start: float = 0.0


def read_captions(path) -> list[tuple[str, str, str, float]]:
    """[(id, caption, file, start)] of a TSV; without these columns, file is the id and start 0."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            header = [name.strip() for name in reader.fieldnames or ()]
            reader.fieldnames = header
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ListError(f"{path}: unreadable ({error})") from error
    if not {"id", "caption"} <= set(header):
        raise ListError(
            f"{path}: its columns are {', '.join(map(repr, header))}; needed are 'id' and "
            "'caption', separated by tabs"
        )
    if not rows:
        raise ListError(f"{path}: no rows below the header")
    found = []
    for number, row in enumerate(rows, 2):
        row = {key: (value or "").strip() for key, value in row.items() if isinstance(key, str)}
        try:
            start = float(row.get("start") or 0)
        except ValueError:
            raise ListError(f"{path}, line {number}: start {row['start']!r} is no number") from None
        found.append((row["id"], row["caption"], row.get("file") or row["id"], start))
    return found


def list_clips(
    folder, captions=None, suffixes: tuple[str, ...] = VIDEO_SUFFIXES
) -> tuple[list[Clip], list[tuple[str, str]]]:
    """Find the files that a list of captions speaks of.

    Args:
      folder: searched with its subfolders for files with one of the `suffixes`.
      captions: TSV with the columns id and caption. An id is the path of a file inside `folder`,
        with or without its suffix, or its stem; a column `file` names the file instead, and a
        column `start` (seconds) where in a sound the clip begins. None takes all files in order of
        their paths, with empty captions and their paths without suffix as ids.

    Returns:
      clips, in the order of the TSV, and [(id, reason)] of the rows that cannot be used.

    Raises:
      ListError: no such folder, no such files in it, or another kind of TSV.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ListError(f"{folder}: no such folder")
    files = sorted(
        file.relative_to(folder).as_posix()
        for file in folder.rglob("*")
        if file.suffix.lower() in suffixes and not file.name.startswith(".")
    )
    if not files:
        raise ListError(f"{folder}: no files that end in {', '.join(suffixes)}")
    if captions is None:
        ids = [Path(file).with_suffix("").as_posix() for file in files]
        rows = [(clip_id, "", clip_id, 0.0) for clip_id in ids]
    else:
        rows = read_captions(captions)
    # The more exact way to name a file wins.
    names = [{file: [file] for file in files}, defaultdict(list), defaultdict(list)]
    for file in files:
        names[1][Path(file).with_suffix("").as_posix()].append(file)
        names[2][Path(file).stem].append(file)
    clips, failures, seen = [], [], set()
    for clip_id, caption, file, start in rows:
        found = next((table[file] for table in names if file in table), [])
        if clip_id in seen:
            failures.append((clip_id, "duplicate id"))
        elif len(found) > 1:
            failures.append((clip_id, f"several files: {', '.join(found)}"))
        elif not found:
            failures.append((clip_id, f"no such file in {folder}"))
        else:
            clips.append(Clip(clip_id, folder / found[0], caption, start))
        seen.add(clip_id)
    return clips, failures

"""Which clips there are: files of a folder, with or without a list of captions."""

import csv
import dataclasses
from collections import defaultdict
from pathlib import Path

VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".3gp")
SOUND_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".aac", ".aif", ".aiff")


class ListError(ValueError):
    """A folder or a list of captions that cannot be used at all; one line."""


@dataclasses.dataclass(frozen=True)
class Clip:
    """A clip's id, file, and caption ("" if it has none)."""

    id: str
    path: Path
    caption: str = ""


def _read_captions(path) -> list[tuple[str, str]]:
    """[(id, caption)] of a TSV."""
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
    return [((row["id"] or "").strip(), (row["caption"] or "").strip()) for row in rows]


def list_clips(
    folder, captions=None, suffixes: tuple[str, ...] = VIDEO_SUFFIXES
) -> tuple[list[Clip], list[tuple[str, str]]]:
    """Find the files that a list of captions speaks of.

    Args:
      folder: searched with its subfolders for files with one of the `suffixes`.
      captions: TSV with the columns id and caption. An id is the path of a file inside `folder`,
        with or without its suffix, or its stem. None takes all files in order of their paths, with
        empty captions and their paths without suffix as ids.

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
        rows = [(Path(file).with_suffix("").as_posix(), "") for file in files]
    else:
        rows = _read_captions(captions)
    # The more exact way to name a file wins.
    names = [{file: [file] for file in files}, defaultdict(list), defaultdict(list)]
    for file in files:
        names[1][Path(file).with_suffix("").as_posix()].append(file)
        names[2][Path(file).stem].append(file)
    clips, failures, seen = [], [], set()
    for clip_id, caption in rows:
        found = next((table[clip_id] for table in names if clip_id in table), [])
        if clip_id in seen:
            failures.append((clip_id, "duplicate id"))
        elif len(found) > 1:
            failures.append((clip_id, f"several files: {', '.join(found)}"))
        elif not found:
            failures.append((clip_id, f"no such file in {folder}"))
        else:
            clips.append(Clip(clip_id, folder / found[0], caption))
        seen.add(clip_id)
    return clips, failures

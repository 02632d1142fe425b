"""The clips of a folder, with or without a list of captions."""

import dataclasses
import math
import os
import unicodedata
from collections import defaultdict
from pathlib import Path

from vcm_jax.media.names import SOUND_SUFFIXES as SOUND_SUFFIXES
from vcm_jax.media.names import VIDEO_SUFFIXES, IdError, check_id
from vcm_jax.media.tables import TableError, read_table


class ListError(ValueError):
    """A folder or a list of captions that cannot be used at all; the message is one line."""


@dataclasses.dataclass(frozen=True)
class Clip:
    """A clip.

    Attributes:
      id: names the clip; see `vcm_jax.media.names.check_id`.
      path: of its file.
      caption: "" if it has none.
      start: seconds from the beginning of the file to the beginning of the clip.
    """

    id: str
    path: Path
    caption: str = ""
    start: float = 0.0


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a list of captions.

    Attributes:
      id, caption, start: see Clip.
      file: names the file; the id if the list has no column `file`.
      problem: why the row cannot be used; "" if it can.
    """

    id: str
    caption: str
    file: str
    start: float = 0.0
    problem: str = ""


def printable(name: str) -> str:
    """A file name with bytes that are not UTF-8, or a message with one, as text: \\xe9 for é."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def composed(name: str) -> str:
    """A name in Unicode's composed form: macOS decomposes letters with accents, lists do not."""
    return unicodedata.normalize("NFC", name)


def read_captions(path) -> list[Row]:
    """Read a list of captions: a TSV with the columns id and caption, and maybe file and start.

    Raises:
      ListError: unreadable, other columns, no rows, or a caption that would be cut or altered.
    """
    try:
        header, table = read_table(path)
    except TableError as error:
        raise ListError(str(error)) from None
    if not {"id", "caption"} <= set(header):
        raise ListError(
            f"{path}: its columns are {', '.join(map(repr, header)) or 'missing'}; needed are "
            "'id' and 'caption', separated by tabs"
        )
    if not table:
        raise ListError(f"{path}: no rows below the header")
    rows = []
    for line, fields in table:
        if printable(fields["caption"]) != fields["caption"]:
            raise ListError(f"{path}, line {line}: the caption is not UTF-8: convert the list")
        clip_id, file = (printable(fields.get(name, "")) for name in ("id", "file"))
        start, problem = _read_start(fields.get("start", ""))
        try:
            check_id(clip_id)
        except IdError as error:
            problem = str(error)
        rows.append(Row(clip_id, fields["caption"], file or clip_id, start, problem))
    return rows


def _read_start(text: str) -> tuple[float, str]:
    """(seconds, problem) of the column start."""
    try:
        start = float(text or 0)
    except ValueError:
        start = math.nan
    if math.isfinite(start) and start >= 0:
        return start, ""
    return 0.0, f"start {text!r} is not a number of seconds from 0 on"


def list_files(folder, suffixes: tuple[str, ...]) -> list[str]:
    """Find the files with one of the `suffixes` in a folder and its subfolders.

    Symbolic links are followed, but each folder is searched once: a link to a folder that is also
    reached without it adds nothing, nor does a link to a folder above it. Files whose names begin
    with a dot are hidden and not listed.

    Returns:
      Paths relative to the folder, sorted.

    Raises:
      ListError: no such folder, or a folder in it that cannot be read.
    """
    if not os.path.isdir(folder):
        raise ListError(f"{printable(str(folder)) or repr('')}: no such folder")
    found, searched, folders, links = [], set(), [""], []
    while folders or links:
        relative = folders.pop() if folders else links.pop(0)
        here = os.path.join(folder, relative)
        try:
            status = os.stat(here)
            entries = sorted(os.scandir(here), key=lambda entry: entry.name)
        except OSError as error:
            raise ListError(f"{printable(here)}: unreadable ({error.strerror})") from error
        if (status.st_dev, status.st_ino) in searched:
            continue
        searched.add((status.st_dev, status.st_ino))
        for entry in entries:
            path = os.path.join(relative, entry.name)
            if _is_folder(entry):
                (links if entry.is_symlink() else folders).append(path)
            elif not entry.name.startswith(".") and path.lower().endswith(suffixes):
                found.append(path)
    return sorted(found)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: reading it gives the reason
        return False


def _stem(file: str) -> str:
    return Path(file).stem


def _without_suffix(file: str) -> str:
    return Path(file).with_suffix("").as_posix()


class _Names:
    """Finds files by their paths, by their paths without suffix, or by their stems."""

    def __init__(self, files: list[str]):
        # The more exact way to name a file wins. Composed names are compared last, so that files
        # whose names differ in their Unicode form alone can be told apart.
        self._tables = []
        for normal in (str, composed):
            for key in (str, _without_suffix, _stem):
                table = defaultdict(list)
                for file in files:
                    table[normal(key(printable(file)))].append(file)
                self._tables.append((normal, table))

    def find(self, name: str) -> list[str]:
        """The files with this name, in the first way in which there are any."""
        return next((t[normal(name)] for normal, t in self._tables if normal(name) in t), [])


def list_clips(
    folder, captions=None, suffixes: tuple[str, ...] = VIDEO_SUFFIXES
) -> tuple[list[Clip], list[tuple[str, str]]]:
    """Find the files that a list of captions names.

    Args:
      folder: searched with its subfolders (see `list_files`) for files with one of the `suffixes`.
      captions: TSV with the columns id and caption. An id is the path of a file inside `folder`,
        with or without its suffix, or its stem; a column `file` names the file instead, and a
        column `start` says how many seconds into the file the clip begins. None takes all files in
        order of their paths, with empty captions and their paths without suffix as ids.

    Returns:
      clips, in the order of the TSV, and [(id, reason)] of the rows that cannot be used.

    Raises:
      ListError: no such folder, no such files in it, or a TSV that cannot be used.
    """
    files = list_files(folder, suffixes)
    folder = Path(folder)
    if not files:
        raise ListError(f"{folder}: no files that end in {', '.join(suffixes)}")
    if captions is None:
        rows = [_row_of_file(printable(file)) for file in files]
    else:
        rows = read_captions(captions)
    names, clips, failures, seen = _Names(files), [], [], set()
    for row in rows:
        found = names.find(row.file)
        if row.problem:
            failures.append((row.id, row.problem))
        elif composed(row.id) in seen:
            failures.append((row.id, "duplicate id"))
        elif len(found) > 1:
            several = ", ".join(map(printable, found))
            failures.append((row.id, f"several files: {several}"))
        elif not found:
            failures.append((row.id, f"no such file in {printable(str(folder))}"))
        else:
            clips.append(Clip(row.id, folder / found[0], row.caption, row.start))
        seen.add(composed(row.id))
    return clips, failures


def _row_of_file(file: str) -> Row:
    clip_id = _without_suffix(file)
    try:
        check_id(clip_id)
    except IdError as error:
        return Row(clip_id, "", clip_id, problem=str(error))
    return Row(clip_id, "", clip_id)

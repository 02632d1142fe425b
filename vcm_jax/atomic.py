"""Files that are there whole or not at all, and JSON files that say what is wrong with them."""

import contextlib
import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path

# Why a file cannot be written although the program is right: the disk, a quota or a limit.
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
_PROBE = 2**16  # bytes


@contextlib.contextmanager
def atomic_path(path):
    """A temporary path beside `path` to write to, moved onto `path` when the block succeeds.

    The name keeps no suffix: say the format where a library would guess it from the name.
    An exception in the block removes the temporary file and leaves `path` as it was. A device or a
    pipe, such as /dev/null, must never be replaced by a file: it is refused.

    Raises:
      ValueError: `path` is there and is not a regular file.
      OSError: `path` cannot be written; its `filename` is `path`, also where a library inside the
        block named the temporary file, or none at all for a full disk.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a regular file: give another path")
    # A short name: that of the file itself may be as long as the file system allows.
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        unnamed = error.filename is None and error.errno in UNWRITABLE
        if unnamed or str(error.filename) == str(temporary):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    except Exception as error:
        # libsndfile and PyTorch do not say that the disk is full: more of the file fails likewise.
        try:
            with temporary.open("ab") as file:
                file.write(bytes(_PROBE))
        except OSError as reason:
            raise OSError(reason.errno, reason.strerror, str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(folder):
    """A path beside `folder` for a new folder, which becomes `folder` when the block succeeds.

    If another process has made `folder` in the meantime, that one stays. An exception in the block
    removes the temporary folder.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path, content, indent: int | None = 1) -> None:
    """Writes JSON as a file that is there whole or not at all."""
    text = json.dumps(content, indent=indent) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path, keys: Iterable[str] = ()) -> dict:
    """The JSON object in a file.

    Raises:
      ValueError: it is not JSON, no object, or lacks one of the `keys`; the line names the file.
      OSError: the file cannot be read.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ValueError(f"{path} is damaged: not JSON ({error})") from None
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise ValueError(f"{path} is damaged: a JSON object is needed, not {kind}")
    if missing := [key for key in keys if key not in content]:
        raise ValueError(f"{path} is damaged: it lacks {', '.join(missing)}")
    return content

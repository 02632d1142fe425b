"""A folder that a command owns: one process at a time works in it, with one set of settings.

with hold(out):
    claim(out, {"seed": seed, "duration": duration})
    ...
"""

import contextlib
import datetime
import errno
import fcntl
import json
import math
import os
import re
import shlex
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from absl import logging

from vcm_jax.atomic import read_json, write_json

_LOCK = re.compile(r"\.lock(?:-(\d+)-of-(\d+))?")
_OWN = re.compile(rf"{_LOCK.pattern}|\..*\.tmp")  # temporary files are those of `atomic_path`
# What `flock` answers on file systems without locks, such as some network mounts.
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_SHOWN = 40  # characters of a setting that a message shows
_COMMAND = 300  # characters of a command that a message shows

_held = set()  # open lock files of this process


class ClaimError(ValueError):
    """A folder that another process works in, or that holds something else; one line."""


def contents(folder) -> list[Path]:
    """What a folder holds besides locks and temporary files; nothing if there is no such folder."""
    folder = Path(folder)
    if not folder.exists():
        return []
    return [path for path in folder.iterdir() if not _OWN.fullmatch(path.name)]


@contextlib.contextmanager
def hold(folder, share: tuple[int, int] = (0, 1)) -> Iterator[None]:
    """Locks a folder for this process while the block runs.

    The operating system holds the lock (`flock` on a file in the folder), so that it ends with the
    process, however that dies. On a file system without locks a warning is logged instead.

    Several processes may share the work in a folder: process i of n passes `share=(i, n)` if it
    takes every n-th item from the i-th on. Shares that have items in common exclude each other, and
    (0, 1), the whole, excludes every other. Of the processes of one distributed run, only the
    first one should lock.

    Args:
      folder: made if it is missing.
      share: (i, n) with 0 <= i < n.

    Raises:
      ClaimError: another process holds the folder (the line says which), or it is a file.
      OSError: the folder cannot be written to; its `filename` is the folder.
    """
    folder = Path(folder)
    path = folder / (".lock" if share == (0, 1) else f".lock-{share[0]}-of-{share[1]}")
    if folder.exists() and not folder.is_dir():
        raise ClaimError(f"{folder} is a file, not a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _lock(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error
    if file is None:
        logging.warning(
            "%s: this file system has no locks: start no second process in this folder", folder
        )
        yield
        return
    _held.add(file)
    try:
        _check_other_shares(folder, share, path)
        yield
    finally:
        if file in _held:  # not in a forked child
            _held.remove(file)
            path.unlink(missing_ok=True)
            file.close()


def _lock(path: Path):
    """The lock file, open and locked; None on a file system without locks.

    Raises:
      ClaimError: another process has it.
      OSError: it cannot be made.
    """
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _read_holder(file)
            file.close()
            raise ClaimError(
                f"{path.parent}: {holder} works in this folder; wait until it has ended"
            ) from None
        except OSError as error:
            file.close()
            path.unlink(missing_ok=True)
            if error.errno in _NO_LOCKS:
                return None
            raise
        # The last holder removes its file: a lock on a removed file excludes nobody.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()
    with contextlib.suppress(OSError):  # a full disk: who holds the lock remains unsaid
        file.truncate(0)
        json.dump(_describe_self(), file)
        file.flush()
    return file


def _describe_self() -> dict:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "command": " ".join(shlex.join(sys.orig_argv).split())[:_COMMAND],
        "since": datetime.datetime.now().isoformat(" ", "seconds"),
    }


def _read_holder(file) -> str:
    try:
        file.seek(0)
        holder = json.load(file)
        return (
            f"process {holder['pid']} on {holder['host']} (since {holder['since']}: "
            f"{holder['command']})"
        )
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _check_other_shares(folder: Path, share: tuple[int, int], own: Path) -> None:
    """Raises ClaimError if another process holds a share that has items in common with this one."""
    for other in folder.iterdir():
        match = _LOCK.fullmatch(other.name)
        if match is None or other == own:
            continue
        index, count = (int(text or default) for text, default in zip(match.groups(), (0, 1)))
        common = math.gcd(count, share[1])
        if index % common == share[0] % common:
            file = _lock(other)
            other.unlink(missing_ok=True)  # left behind by a process that died
            if file is not None:
                file.close()


def _release_in_child() -> None:
    """A child process that was forked must not keep the locks when this process has died."""
    for file in _held:
        file.close()
    _held.clear()


os.register_at_fork(after_in_child=_release_in_child)


def claim(
    folder,
    settings: dict,
    name: str = "settings.json",
    *,
    flag: str = "--out",
    is_begun: Callable[[], bool] | None = None,
) -> bool:
    """Notes in a folder what its contents are made with, or checks that they were made with it.

    Args:
      folder: made if it is missing.
      settings: everything that the contents follow from; JSON.
      name: of the JSON file in the folder.
      flag: the command's flag for the folder, for messages.
      is_begun: whether the folder holds anything that follows from its settings. If it returns
        False, a folder with other settings or other files is taken over. By default only an empty
        folder is.

    Returns:
      Whether the folder had these settings already.

    Raises:
      ClaimError: the folder holds other files, or output of other settings, which the line names.
      ValueError: the JSON file is damaged.
      OSError: the folder cannot be written to.
    """
    folder, settings = Path(folder), json.loads(json.dumps(settings))
    path = folder / name
    if folder.exists() and not folder.is_dir():
        raise ClaimError(f"{flag}={folder} is a file, not a folder")
    there = read_json(path) if path.exists() else None
    if there == settings:
        return True
    begun = bool(contents(folder)) if is_begun is None else is_begun()
    if begun and there is None:
        raise ClaimError(
            f"{flag}={folder} holds other files and no {name}: give a new or empty folder"
        )
    if begun:
        raise ClaimError(
            f"{flag}={folder} was made with other settings ({describe_difference(there, settings)})"
            ": give another folder"
        )
    write_json(path, settings)
    return False


def describe_difference(old: dict, new: dict) -> str:
    """Names the entries in which two dictionaries differ, with short values: "seed 1, not 2".

    Entries of inner dictionaries are named with dots.
    """
    old, new = dict(_flatten(old)), dict(_flatten(new))
    shown = []
    for key in [*new, *(key for key in old if key not in new)]:
        if key in old and key in new and old[key] == new[key]:
            continue
        values = [json.dumps(d[key]) if key in d else "missing" for d in (old, new)]
        short = max(map(len, values)) <= _SHOWN
        shown.append(f"{key} {values[0]}, not {values[1]}" if short else key)
    return "; ".join(shown)


def _flatten(settings: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value

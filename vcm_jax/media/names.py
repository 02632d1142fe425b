"""File names for what is written for a clip: safe for any id, and the id can be read back.

An id may name subfolders ("train/0001"). What a file name cannot hold, or what a folder's listing
would pass over, is written as %XX: control characters, and a dot at the beginning of a name. A
media suffix is dropped, so that the sound for the id "x.mp4" is x.wav, which has the stem of the
clip. Ids are NFC in names: macOS writes ü as two characters, most lists as one.
"""

import re
import unicodedata

VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".3gp")
SOUND_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".aac", ".aif", ".aiff")

# A dot at the beginning of a name, control characters, and a % that would read as an escape.
_UNSAFE = re.compile(r"(?:(?<=/)|^)\.|[\x00-\x1f\x7f]|%(?=[0-9A-Fa-f]{2})")
_ESCAPE = re.compile(r"%([0-9A-Fa-f]{2})")


class IdError(ValueError):
    """An id that cannot name a file inside of an output folder; one line."""


def check_id(clip_id: str) -> None:
    """Raises IdError for an id that is empty or leads out of a folder: "../x", "/x", "a//b"."""
    parts = clip_id.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\0" in clip_id:
        raise IdError(f"the id {clip_id!r} does not name a file inside of a folder")
    if not _stem(clip_id).rpartition("/")[2]:
        raise IdError(f"the id {clip_id!r} is a suffix alone")


def output_name(clip_id: str) -> str:
    """The relative path, without suffix, of what is written for a clip.

    Different ids give different names, but for media suffixes and Unicode forms; check a list for
    names that occur twice.

    Raises:
      IdError: see `check_id`.
    """
    check_id(clip_id)
    return _escape(_stem(unicodedata.normalize("NFC", clip_id)))


def id_of(name: str) -> str:
    """The id, without media suffix, whose `output_name` is `name`."""
    return _ESCAPE.sub(lambda match: chr(int(match[1], 16)), name)


def pairing_key(name: str) -> str:
    """What files of one clip have in common: a name without suffix, written by us or by others.

    The key of an `output_name` is itself. The name of a file that was not written by this package
    gets the key of the id that it stands for.
    """
    name = _stem(unicodedata.normalize("NFC", name))
    return name if _escape(id_of(name)) == name else _escape(name)


def _stem(name: str) -> str:
    """A name without media suffixes."""
    while name.lower().endswith(VIDEO_SUFFIXES + SOUND_SUFFIXES):
        name = name[: name.rindex(".")]
    return name


def _escape(name: str) -> str:
    return _UNSAFE.sub(lambda match: f"%{ord(match[0]):02X}", name)

"""Codec folders: their description codec.json, and how they are made and copied."""

import os
import shutil
from pathlib import Path

from vcm_jax.atomic import atomic_folder, read_json, write_json
from vcm_jax.hashes import open_seal, seal


def _link(path, target) -> None:
    """Make `target` the same file as `path`, by a hard link if possible."""
    try:
        # A link to a relative symbolic link would lead nowhere from another folder.
        os.link(os.path.realpath(path), target)
    except OSError:  # another file system, no hard links, or a file of another user
        shutil.copyfile(path, target)


def copy_codec(source, folder) -> None:
    """Copy a codec folder. Hard links share its files, which never change, where possible.

    Folders inside it, such as the one of its training, are not copied. The copy appears when it is
    complete; if `folder` exists already, it stays as it is.

    Raises:
      OSError: `source` cannot be read or `folder` not written.
    """
    with atomic_folder(folder) as temporary:
        temporary.mkdir()
        for path in Path(source).iterdir():
            if not path.is_dir():
                _link(path, temporary / path.name)


def write_description(folder, content: dict) -> None:
    """Write codec.json, which makes a folder a codec: after all other files."""
    write_json(Path(folder) / "codec.json", seal(content))


def read_description(folder) -> dict:
    """Read codec.json.

    Raises:
      ValueError: there is none, or it is damaged.
    """
    path = Path(folder) / "codec.json"
    try:
        content = read_json(path, ["name"])
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{folder}: not a codec folder (it has no codec.json)") from None
    return open_seal(content, path)


def check_description(codec, content: dict, folder) -> None:
    """Compare a codec with its description.

    Raises:
      ValueError: another sample rate, rate or number of latents, or fingerprint.
    """
    keys = ("name", "sample_rate", "hop", "latent_downsample", "latent_dim", "fingerprint")
    wrong = [key for key in keys if content.get(key) != getattr(codec, key)]
    if wrong:
        raise ValueError(
            f"{Path(folder) / 'codec.npz'}: its contents do not fit codec.json ({', '.join(wrong)})"
        )

"""Hashes of contents, which show whether what is read is what was written."""

import hashlib
import json
from collections.abc import Mapping

import numpy as np


def short_hash(*chunks) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of bytes or arrays."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()[:16]


def array_hash(array: np.ndarray) -> str:
    """Hash of an array's values, shape and type."""
    return short_hash(f"{array.dtype.str} {array.shape} ".encode(), np.ascontiguousarray(array))


def _hash_json(content: Mapping) -> str:
    return short_hash(json.dumps(content, sort_keys=True).encode())


def seal(content: Mapping) -> dict:
    """A JSON object with an entry `hash`, the hash of its other entries."""
    return dict(content) | {"hash": _hash_json(content)}


def open_seal(content: Mapping, path) -> dict:
    """Check the entry `hash` of a JSON object, and remove it.

    Objects without the entry, as earlier versions wrote them, are not checked.

    Raises:
      ValueError: the other entries are not those that were sealed; one line that names `path`.
    """
    rest = {key: value for key, value in content.items() if key != "hash"}
    if "hash" in content and content["hash"] != _hash_json(rest):
        raise ValueError(
            f"{path}: damaged, or edited: its entries do not match its hash (after a deliberate "
            "edit remove the entry 'hash')"
        )
    return rest

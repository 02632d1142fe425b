"""Files that are there whole or not at all."""

import contextlib
import os
import secrets
from pathlib import Path


@contextlib.contextmanager
def atomic_path(path):
    """A temporary path beside `path` to write to, moved onto `path` when the block succeeds.

    The name keeps no suffix: say the format where a library would guess it from the name.
    An exception in the block removes the temporary file and leaves `path` as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # File systems allow 255 bytes for a name.
    name = os.fsencode(path.name)[:200].decode("utf-8", "ignore")
    temporary = path.with_name(f".{name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

"""The temporary files of the page: one folder, gone with the server, emptied as visitors leave."""

import secrets
import shutil
import tempfile
import threading
import time
from pathlib import Path


class Files:
    """Folders of results by session, in one temporary folder that only this user can read.

    Args:
      keep_seconds: for how long results of visitors are kept who have not closed the page.
    """

    def __init__(self, keep_seconds: float = 3600):
        self._temporary = tempfile.TemporaryDirectory(prefix="vcm_jax_web_")
        self.root = Path(self._temporary.name).resolve()
        self._keep = keep_seconds
        self._made: dict[Path, tuple[str, float]] = {}  # folder: (session, when)
        self._lock = threading.Lock()

    def folder(self, session: str) -> Path:
        """A new folder for a session's results; removes what is too old."""
        path = self.root / "results" / secrets.token_hex(16)
        path.mkdir(parents=True)
        with self._lock:
            now = time.monotonic()
            old = [p for p, (_, when) in self._made.items() if now - when > self._keep]
            self._made[path] = session, now
        self._remove(old)
        return path

    def copy(self, path: Path) -> Path:
        """A copy of a file under its own name: only what is in this folder is given out."""
        copy = self.root / "clips" / path.name
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
        return copy

    def drop(self, session: str) -> None:
        """Removes a session's results."""
        with self._lock:
            gone = [path for path, (owner, _) in self._made.items() if owner == session]
        self._remove(gone)

    def _remove(self, folders) -> None:
        for path in folders:
            with self._lock:
                self._made.pop(path, None)
            shutil.rmtree(path, ignore_errors=True)

    def close(self) -> None:
        """Removes everything."""
        self._temporary.cleanup()

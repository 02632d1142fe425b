"""Downloads over HTTP that continue after dropped connections and after a restart."""

import os
import re
import time
from pathlib import Path

import requests
from tqdm import tqdm

RETRIES = 5  # in a row without progress
WAIT = 1.0  # seconds before the first of them; each next one waits twice as long
_TIMEOUT = (10, 30)  # seconds to connect, and between two chunks
CHUNK = 1 << 16  # bytes that are written at a time; a dropped connection loses less than these
_PROGRESS = 1 << 20  # bytes after which a failure counts as the first again


class ResumingDownloader:
    """A downloader for pooch that keeps what has come in `partial` and asks for the rest.

    pooch's own downloader starts from zero after each interruption.

    Args:
      partial: file that survives interruptions; it moves to the output file when it is complete.
    """

    def __init__(self, partial: Path):
        self._partial = partial

    def __call__(self, url: str, output_file: str, pooch) -> None:
        """Downloads `url`.

        Raises:
          requests.RequestException: after RETRIES failures in a row, or a refusal of the server.
          OSError: the file cannot be written.
        """
        del pooch
        failures = 0
        with requests.Session() as session:
            while True:
                before = self._size()
                try:
                    self._attempt(session, url)
                    break
                except (requests.ConnectionError, requests.Timeout) as error:
                    reason = error
                except requests.exceptions.ChunkedEncodingError as error:
                    reason = error
                failures = 0 if self._size() >= before + _PROGRESS else failures + 1
                if failures > RETRIES:
                    raise reason
                time.sleep(WAIT * 2 ** max(0, failures - 1))
        os.replace(self._partial, output_file)

    def _size(self) -> int:
        return self._partial.stat().st_size if self._partial.exists() else 0

    def _attempt(self, session: requests.Session, url: str) -> None:
        """One request for what is missing; returns when the file is complete."""
        start = self._size()
        headers = {"Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        with session.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as response:
            if response.status_code >= 500 or response.status_code == 429:
                raise requests.ConnectionError(f"HTTP status {response.status_code}")
            if response.status_code == 416:  # nothing follows after `start`
                if self._total(response) == start:
                    return
                self._partial.unlink()
                raise requests.ConnectionError("the file has become shorter")
            response.raise_for_status()
            if response.status_code == 206:
                if not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                    self._partial.unlink(missing_ok=True)
                    raise requests.ConnectionError("the server sent another range")
            else:
                start = 0  # the server sends the file from its beginning
            total = self._total(response)
            self._write(response, start, total)
        if total is not None and self._size() < total:
            raise requests.ConnectionError(f"{self._size()} of {total} bytes have come")

    def _write(self, response: requests.Response, start: int, total: int | None) -> None:
        name = self._partial.name
        with (
            open(self._partial, "ab" if start else "wb") as file,
            tqdm(
                total=total, initial=start, desc=name, unit="B", unit_scale=True, disable=None
            ) as progress,
        ):
            for chunk in response.iter_content(CHUNK):
                file.write(chunk)
                progress.update(len(chunk))

    @staticmethod
    def _total(response: requests.Response) -> int | None:
        """Bytes of the whole file, as far as the server says."""
        if response.status_code == 200:
            length = response.headers.get("Content-Length", "")
        else:
            found = re.search(r"/(\d+)$", response.headers.get("Content-Range", ""))
            length = found[1] if found else ""
        return int(length) if length.isdigit() else None

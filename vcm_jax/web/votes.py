"""Votes of comparisons: one line each in a tab-separated file."""

import datetime
import threading
from pathlib import Path

_HEADER = ("time", "clip", "prompt", "a", "b", "blind", "vote")
VOTES = {"a": "A is better", "b": "B is better", "same": "No difference"}


class Votes:
    """The file of votes, which grows; it is made with the first one.

    Columns: time (UTC), clip, prompt, how A and B were made, whether that was hidden, and the vote:
    a, b or same.

    Args:
      path: of the file.
    """

    def __init__(self, path):
        self.path, self._lock = Path(path), threading.Lock()

    def add(self, clip: str, prompt: str, a: str, b: str, blind: bool, vote: str) -> None:
        """Adds a line.

        Raises:
          ValueError: there is no such vote.
          OSError: the file cannot be written.
        """
        if vote not in VOTES:
            raise ValueError(f"a vote is one of {', '.join(VOTES)}, not {vote}")
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        row = [now, clip, prompt, a, b, "yes" if blind else "no", vote]
        line = "\t".join(" ".join(str(field).split()) for field in row) + "\n"
        with self._lock, open(self.path, "a", encoding="utf-8", errors="replace") as file:
            if not file.tell():
                file.write("\t".join(_HEADER) + "\n")
            file.write(line)

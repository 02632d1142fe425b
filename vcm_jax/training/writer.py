"""What a run writes while it trains: TensorBoard events, a JSON-lines file, a progress line."""

import datetime
import json
import math
import time
from pathlib import Path

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2

from vcm_jax.atomic import atomic_path
from vcm_jax.media.loudness import limit


class Writer:
    """Writes metrics and sounds; only one process of a run does, the others have `enabled=False`.

    A resumed run appends to the same files, after the lines of steps beyond the one that it resumes
    from are removed. The calling thread writes the events. The thread of tensorboardX's
    SummaryWriter would die when the disk is full, and the run would wait for it forever.

    Attributes:
      workdir: events go to WORKDIR/tensorboard, metrics also to WORKDIR/metrics.jsonl.

    Raises:
      OSError: the disk is full; every method may raise it.
    """

    def __init__(self, workdir, first_step: int = 0, enabled: bool = True):
        self.workdir = Path(workdir)
        self._events = self._lines = None
        if not enabled:
            return
        folder = self.workdir / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        self._events = EventsWriter(str(folder / "events"), f".{first_step}")
        if first_step:
            session = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._event(first_step + 1, session_log=session)
        path = self.workdir / "metrics.jsonl"
        _drop_later_lines(path, first_step)
        self._lines = path.open("a", buffering=1)

    @property
    def enabled(self) -> bool:
        return self._events is not None

    def _event(self, step: int, **what) -> None:
        self._events.write_event(event_pb2.Event(wall_time=time.time(), step=step, **what))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Writes the finite values; an average over nothing is NaN, and is left out."""
        if self._events is None:
            return
        finite = {name: float(v) for name, v in values.items() if math.isfinite(v)}
        self._lines.write(json.dumps({"step": step, "time": time.time(), **finite}) + "\n")
        for name, value in finite.items():
            self._event(step, summary=summary.scalar(name, value))

    def sound(self, step: int, name: str, sound: np.ndarray, sample_rate: int) -> None:
        """Writes a mono sound, with its true peak limited to -1 dBTP, and its spectrogram."""
        if self._events is None:
            return
        sound = np.nan_to_num(sound)
        heard, _ = limit(sound, sample_rate)
        self._event(step, summary=summary.audio(name, heard, sample_rate))
        image = spectrogram(sound, sample_rate)
        self._event(step, summary=summary.image(f"{name}/spectrogram", image, dataformats="HW"))

    def flush(self) -> None:
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        if self._events is not None:
            self._lines.close()
            self._events.close()


def _drop_later_lines(path: Path, last_step: int) -> None:
    """Removes the lines after a step, and a line that is cut off because the run was killed."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line)
        except json.JSONDecodeError:
            continue
    with atomic_path(path) as temporary:
        temporary.write_text("".join(kept))


def spectrogram(sound: np.ndarray, sample_rate: int) -> np.ndarray:
    """A spectrogram as an image, uint8 `H W`: white is the maximum, black 80 dB below.

    Windows have 32 ms and start every 8 ms. Low frequencies are at the bottom.
    """
    size, hop = round(0.032 * sample_rate), round(0.008 * sample_rate)
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(sound, size // 2), size)[::hop]
    power = np.abs(np.fft.rfft(frames * np.hanning(size), axis=1)) ** 2
    decibels = 10 * np.log10(power / max(power.max(), 1e-12) + 1e-8)
    return np.uint8(255 * (1 + decibels.T[::-1] / 80).clip(0, 1))


def progress_line(
    step: int, steps: int, values: dict[str, float], batch_size: int, seconds: float
) -> str:
    """One line about the progress of the run; `seconds` is the time per step."""
    shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
    left = datetime.timedelta(seconds=round(seconds * (steps - step)))
    return f"step {step}/{steps}  {shown}  {batch_size / seconds:.3g} samples/s  {left} left"

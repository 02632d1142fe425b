"""Where a run's numbers go: TensorBoard events, a JSON-lines file, a progress line."""

import json
import math
import time
from pathlib import Path

import numpy as np
import tensorboardX


class Writer:
    """Writes from one process; the others of a run get `enabled=False` and write nothing.

    A resumed run goes on in the same files. TensorBoard drops what an interrupted run had written
    beyond the step it resumes from.

    Attributes:
      workdir: events go to WORKDIR/tensorboard, numbers also to WORKDIR/metrics.jsonl.
    """

    def __init__(self, workdir, first_step: int = 0, enabled: bool = True):
        self.workdir = Path(workdir)
        self._events = self._lines = None
        if enabled:
            self._events = tensorboardX.SummaryWriter(
                str(self.workdir / "tensorboard"), purge_step=first_step or None
            )
            self._lines = (self.workdir / "metrics.jsonl").open("a")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Writes finite numbers; an average over nothing is left out."""
        if self._events is None:
            return
        finite = {name: float(v) for name, v in values.items() if math.isfinite(v)}
        for name, value in finite.items():
            self._events.add_scalar(name, value, step)
        self._lines.write(json.dumps({"step": step, "time": time.time(), **finite}) + "\n")

    def audio(self, step: int, name: str, samples: np.ndarray, sample_rate: int) -> None:
        """Writes a mono sound, float `n` in [-1, 1]."""
        if self._events is not None:
            self._events.add_audio(name, samples[None, :], step, sample_rate=sample_rate)

    def figure(self, step: int, name: str, figure) -> None:
        """Writes a matplotlib figure and closes it."""
        if self._events is not None:
            self._events.add_figure(name, figure, step)

    def flush(self) -> None:
        if self._events is not None:
            self._events.flush()
            self._lines.flush()

    def close(self) -> None:
        if self._events is not None:
            self._events.close()
            self._lines.close()


def progress_line(
    step: int, steps: int, values: dict[str, float], samples_per_s: float, seconds_left: float
) -> str:
    """One line on how the run is going."""
    shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
    minutes, seconds = divmod(round(seconds_left), 60)
    hours, minutes = divmod(minutes, 60)
    left = f"{hours}:{minutes:02d}:{seconds:02d}"
    return f"step {step}/{steps}  {shown}  {samples_per_s:.0f} samples/s  {left} left"

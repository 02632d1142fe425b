"""Where a run's numbers go: TensorBoard events, a JSON-lines file, a progress line."""

import datetime
import json
import math
import time
from pathlib import Path

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

    def flush(self) -> None:
        if self._events is not None:
            self._events.flush()
            self._lines.flush()

    def close(self) -> None:
        if self._events is not None:
            self._events.close()
            self._lines.close()


def progress_line(
    step: int, steps: int, values: dict[str, float], batch_size: int, seconds: float
) -> str:
    """One line on how the run is going; `seconds` is the time of a step."""
    shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
    left = datetime.timedelta(seconds=round(seconds * (steps - step)))
    return f"step {step}/{steps}  {shown}  {batch_size / seconds:.3g} samples/s  {left} left"

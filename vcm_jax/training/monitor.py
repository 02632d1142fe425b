"""Watching a run: metrics of its steps, where their time goes, and what it sounds like."""

import contextlib
import functools
import json
import resource
import sys
import time
from collections import defaultdict
from pathlib import Path

import jax
import librosa
import numpy as np
import optax
from absl import logging

from vcm_jax.devices import sharding
from vcm_jax.models import ModelConfig
from vcm_jax.models.flops import step_flops
from vcm_jax.training import validation
from vcm_jax.training.loss import loss_fn
from vcm_jax.training.rows import StepConfig
from vcm_jax.training.selection import ALL
from vcm_jax.training.writer import Writer

# Dense bfloat16 peaks in TFLOP/s by the beginning of `device_kind` (the makers' data sheets).
PEAK_TFLOPS = {
    "NVIDIA A100": 312,
    "NVIDIA H100": 989,
    "NVIDIA H200": 989,
    "NVIDIA B200": 2250,
    "TPU v4": 275,
    "TPU v5 lite": 197,
    "TPU v5": 459,
    "TPU v6": 918,
}
# How many steps the host may be ahead of the devices: enough to keep them busy, and few enough that
# the run notices a SIGTERM or a bad loss soon.
AHEAD = 2
NONFINITE_IN_A_ROW = 3


class NonFiniteError(ArithmeticError):
    """A loss or a gradient is not finite; one line that names the step and its records."""


class Meter:
    """Averages metrics over the steps since the last log, and measures their time.

    Args:
      first_step: the number of steps that are done already.
      on_nonfinite: what to do with steps that are not finite: "stop", or "skip", which stops after
        three steps in a row.
      record_ids: a function from the number of a step (the first is 1) to the ids of its batch.
      report: a file that gets one JSON line for each such step; None for no file.
    """

    def __init__(self, first_step: int, on_nonfinite: str, record_ids, report: Path | None):
        self._on_nonfinite, self._record_ids, self._report = on_nonfinite, record_ids, report
        self._step = self._from = self._checked = first_step
        self._pending, self._skipped, self._in_a_row = [], 0, 0
        self._seconds, self._tick = defaultdict(float), time.perf_counter()

    @contextlib.contextmanager
    def waiting(self, what: str):
        """Counts the time of the block as spent on `what`."""
        before = time.perf_counter()
        yield
        self._seconds[what] += time.perf_counter() - before

    def add(self, metrics) -> None:
        """Takes the metrics of a step that was started, and waits for the step `AHEAD` before it.

        Raises:
          NonFiniteError: that earlier step is not finite.
        """
        self._pending.append(metrics)
        self._step += 1
        self._check(self._step - AHEAD)

    def _check(self, last: int) -> None:
        while self._checked < last:
            metrics = self._pending[self._checked - self._from]
            with self.waiting("device"):
                bad = float(metrics.nonfinite.total) > 0
            self._checked += 1
            self._in_a_row = self._in_a_row + 1 if bad else 0
            if bad:
                self._nonfinite(metrics, self._checked)

    def _nonfinite(self, metrics, step: int) -> None:
        self._skipped += 1
        values = {name: float(getattr(metrics, name).compute()) for name in ("loss", "grad_norm")}
        name, value = next(
            (item for item in values.items() if not np.isfinite(item[1])), ("a gradient", "inf")
        )
        ids = self._record_ids(step)
        if self._report:
            with self._report.open("a") as file:
                file.write(json.dumps({"step": step, "values": str(values), "ids": ids}) + "\n")
        line = f"{name} is {value} at step {step}; its records: {', '.join(ids[:8])}"
        if len(ids) > 8:
            line += f" and {len(ids) - 8} more, all in {self._report or 'nonfinite.jsonl'}"
        if self._on_nonfinite == "stop":
            raise NonFiniteError(line)
        if self._in_a_row >= NONFINITE_IN_A_ROW:
            raise NonFiniteError(f"{self._in_a_row} steps in a row were skipped: {line}")
        logging.warning("skipped a step: %s", line)

    def collect(self) -> tuple[dict[str, float], float]:
        """(metrics, seconds per step) averaged since the last call; waits for all steps.

        The metrics `speed/..._ms` are milliseconds per step: `data_wait` is the time that the loop
        waits for the next batch, `device` that for the devices, and `host` the rest. The time in
        `pause` (evaluation and saving) is not counted.

        Raises:
          NonFiniteError: one of the steps is not finite.
        """
        self._check(self._step)
        pending, steps = jax.device_get(self._pending), self._step - self._from
        with np.errstate(invalid="ignore"):  # an empty bin becomes NaN and is not logged
            merged = functools.reduce(lambda a, b: a.merge(b), pending).compute()
        values = {f"train/{k}": float(v) for k, v in merged.items() if k != "nonfinite"}
        values["train/skipped_steps"] = self._skipped
        now = time.perf_counter()
        total = now - self._tick - self._seconds.pop("pause", 0.0)
        for name in ("data_wait", "device"):
            values[f"speed/{name}_ms"] = 1e3 * self._seconds[name] / steps
        values["speed/host_ms"] = 1e3 * (total - sum(self._seconds.values())) / steps
        values["speed/step_ms"] = 1e3 * total / steps
        self._pending, self._from, self._tick = [], self._step, now
        self._seconds.clear()
        return values, total / steps


def speed(seconds: float, batch_size: int, flops_per_sample: float) -> dict[str, float]:
    """Throughput for a time per step, and the MFU for devices whose peak is known."""
    devices = jax.devices()
    rate = batch_size / seconds
    tflops = rate * flops_per_sample / len(devices) / 1e12
    found = {"speed/samples_per_s": rate, "speed/tflops_per_device": tflops}
    for kind, peak in PEAK_TFLOPS.items():
        if devices[0].device_kind.startswith(kind):
            return found | {"speed/mfu": tflops / peak}
    return found


def memory() -> dict[str, float]:
    """Peak memory in GiB: of this process, and of its first device if that reports it."""
    unit = 2**20 if sys.platform == "linux" else 2**30
    found = {"memory/host_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        found["memory/device_peak_gib"] = stats["peak_bytes_in_use"] / 2**30
    return found


def model_flops(model: ModelConfig, config: StepConfig, step, batch, devices: int = 1):
    """(FLOP a sample of one step, how they were counted).

    They are counted by hand from the objective's network passes, so that the MFU of any arrangement
    is relative to the same number. Where a teacher's passes come on top it is XLA's count of the
    compiled step for so many devices, which also includes what is computed twice.
    """
    if not config.objective.has_teacher:
        passes = config.objective.passes()
        return step_flops(model, passes, config.dispersive > 0), "counted by hand"
    return xla_flops(step, devices) / len(batch["latent_mean"]), "XLA's count"


def xla_flops(compiled, devices: int) -> float:
    """XLA's count of the FLOPs of a program that was compiled for so many devices."""
    found = compiled.cost_analysis()
    found = found[0] if isinstance(found, list) else found
    return float(found.get("flops", 0.0)) * devices


@jax.jit
def ema_distance(state) -> dict[str, jax.Array]:
    """|EMA weights - parameters| / |parameters| for every width."""
    norm = optax.tree.norm(state.params)
    return {
        f"ema/distance_{width}": optax.tree.norm(optax.tree.sub(weights, state.params)) / norm
        for width, weights in state.ema.items()
    }


class Evaluation:
    """Evaluates the first of the EMA weights on validation clips, and generates sounds.

    Args:
      net, config, layout, teacher, teacher_variables: those of the training step.
      key: the key of times and noise, which are the same at every evaluation.
      batches: a function that returns the validation batches, on the devices.
      clips: one batch of the clips to listen to, whole on every device.
      codec: decodes latents.
      best: keeps the weights with the best metric; None for no metrics of sounds.
      sample_steps, max_clips: as `steps` and `max_clips` of `validation.sound_metrics`.
      selection: what of the network's parameters is trained.
    """

    HEARD_STEPS = (1, 4, 25)

    def __init__(
        self, net, config: StepConfig, layout, key, *, batches, clips, codec,
        teacher=None, teacher_variables=None, best=None, sample_steps=(), max_clips=0,
        selection=ALL,
    ):  # fmt: skip
        self._net, self._config, self._key = net, config, key
        self._batches, self._clips, self._codec = batches, clips, codec
        self._teacher_variables = teacher_variables
        self._best, self._sample_steps, self._max_clips = best, sample_steps, max_clips
        self._whole, self._heard_truth = sharding.replicated(layout.mesh), False

        def losses(*args):
            return loss_fn(*args, net=net, config=config, constrain=layout.rows, teacher=teacher)[1]

        self._losses = jax.jit(losses, out_shardings=self._whole)
        self._complete = jax.jit(selection.complete) if not selection.is_whole else lambda p, _: p

    def _params(self, state):
        """The first of the EMA weights, as all of the network's parameters."""
        return self._complete(next(iter(state.ema.values())), state.frozen)

    def values(self, state, meta: dict) -> dict[str, float]:
        """`val/...`: loss and metrics of generated sounds; the best weights are kept."""
        params = self._params(state)
        found = []
        for i, batch in enumerate(self._batches()):
            key = jax.random.fold_in(self._key, i)
            args = (params, state.stats, batch, key, state.step, self._teacher_variables)
            found.append(jax.device_get(self._losses(*args)))
        with np.errstate(invalid="ignore"):
            merged = functools.reduce(lambda a, b: {k: v.merge(b[k]) for k, v in a.items()}, found)
            values = {f"val/{name}": float(value.compute()) for name, value in merged.items()}
        if self._best is not None:
            values |= validation.sound_metrics(
                self._net,
                params,
                state.stats,
                self._batches(),
                self._codec,
                self._key,
                steps=self._sample_steps,
                max_clips=self._max_clips,
                place=self._whole,
                objective=self._config.objective,
            )
            self._best.offer(state, values, meta)
        return values

    def sounds(self, state, writer: Writer) -> None:
        """Writes sounds and spectrograms of the clips, the first time also of the true sounds."""
        params = self._params(state)
        for n in self.HEARD_STEPS:
            pair = validation.generate(
                params,
                state.stats,
                self._clips,
                self._key,
                self._net,
                self._config.objective,
                n,
                self._whole,
            )
            if not writer.enabled:
                continue
            found, truth = jax.device_get(pair)
            heard = {f"{n}_steps": found} | ({} if self._heard_truth else {"truth": truth})
            self._heard_truth = True
            for name, latents in heard.items():
                for i, latent in enumerate(latents):
                    try:
                        sound = self._codec.decode(latent)
                    except (ValueError, librosa.ParameterError) as error:  # the run may recover
                        logging.warning("clip_%d/%s has no sound: %s", i, name, error)
                        continue
                    writer.sound(
                        int(state.step), f"clip_{i}/{name}", sound, self._codec.sample_rate
                    )


def parse_profile(text: str) -> tuple[int, int] | None:
    """The steps of a trace from 'START:STOP'; None from ''.

    Raises:
      ValueError: the text is neither.
    """
    if not text:
        return None
    start, _, stop = text.partition(":")
    if not (start.isdigit() and stop.isdigit() and 0 < int(start) < int(stop)):
        raise ValueError(f"profile {text!r} must be START:STOP, two step numbers, START above 0")
    return int(start), int(stop)


class Profile:
    """Traces the steps START ... STOP - 1 into WORKDIR/profile, which xprof reads.

    It has to be called with the number of every step before the step is started. `close` ends a
    trace early.
    """

    def __init__(self, span: tuple[int, int] | None, workdir: Path):
        self._span, self._folder, self._on = span, Path(workdir) / "profile", False

    def __call__(self, step: int, state) -> None:
        if self._span is None:
            return
        if not self._on and step == self._span[0]:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._folder)
            self._on = True
        elif self._on and step == self._span[1]:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        if self._on:
            jax.profiler.stop_trace()
            logging.info("trace of steps %d to %d: %s", *self._span, self._folder)
            self._on = False

"""The story of a run: mesh, data, init or restore, loop, log, evaluate, save."""

import contextlib
import functools
from pathlib import Path

import jax
from absl import logging
from ml_collections import ConfigDict

from vcm_jax.claim import ClaimError
from vcm_jax.devices import distributed, preemption
from vcm_jax.records.schema import RecordError
from vcm_jax.runs import averages, checkpoint
from vcm_jax.training import monitor, resume, stages, validation
from vcm_jax.training.dry_run import show
from vcm_jax.training.monitor import NonFiniteError as NonFiniteError
from vcm_jax.training.program import make_program
from vcm_jax.training.setup import SetupError, read_setup
from vcm_jax.training.state import learning_rate_schedule
from vcm_jax.training.writer import Writer, progress_line


def _due(every: int, step: int, *, steps: int) -> bool:
    """Whether something done every so many steps (0: never) is due; the last step always is."""
    return bool(every) and (step == steps or step % every == 0)


def train(config: ConfigDict, workdir: str, dry_run: bool = False, fit: bool = False) -> None:
    """Trains as `config` says; resumes from the latest checkpoint in `workdir`.

    With `dry_run` it compiles the step for the configured mesh, prints what it takes, and writes
    nothing. With `fit`, too, it looks for the largest batch whose step fits the devices.

    Raises:
      SetupError: config, data, devices and checkpoint do not fit together.
      NonFiniteError: the loss is no longer finite; the last checkpoint is good.
      StorageError: nothing can be saved any more; the last checkpoint is good.
      Preempted: after a SIGTERM, when the state is saved.
    """
    try:
        # However the run ends, a checkpoint that is being written in the background is finished.
        with contextlib.ExitStack() as stack:
            _train(config, Path(workdir), stack, dry_run, fit)
    except (RecordError, checkpoint.CheckpointError, resume.ResumeError, ClaimError) as error:
        raise SetupError(str(error)) from error


def _train(
    config: ConfigDict, workdir: Path, stack: contextlib.ExitStack, dry_run: bool, fit: bool
) -> None:
    # What the run is made of. Bad input ends it here, before anything is computed or written.
    setup = read_setup(config, without_data=dry_run)
    program = make_program(config, setup)
    start = stages.read_start(config, workdir, program)
    if dry_run:
        show(config, program, fit)
        return

    # The state: a new one, or the latest checkpoint's.
    saver, snapshots = stages.open_checkpoints(config, workdir, stack)
    meta = stages.describe_run(config, setup, start)
    state = stages.init_or_restore(config, workdir, program, start, saver, meta)
    first_step = int(state.step)
    if first_step >= config.steps:
        logging.info("%s is complete: %d of %d steps", workdir, first_step, config.steps)
        return
    due = functools.partial(_due, steps=config.steps)
    stages.align_snapshots(snapshots, state, due(config.snapshot_every, first_step))
    if stages.is_leader():
        stages.write_description(config, setup, start, workdir)

    # The step, compiled ahead of the loop; from here on a SIGTERM saves the state.
    run_key, val_key = program.split_key()
    told_to_stop = stack.enter_context(preemption.watch())
    step_fn, flops = program.compile()
    distributed.wait_for_all("compiled")

    # Data, evaluation, logs.
    mixed, batches = stages.open_data(config, setup, program, first_step)
    evaluation = stages.make_evaluation(config, program, start, workdir, val_key)
    writer = Writer(workdir, first_step, enabled=stages.is_leader())
    stack.enter_context(contextlib.closing(writer))
    profile = stages.open_profile(setup, workdir, first_step, stack)
    meter = stages.make_meter(config, mixed, workdir, first_step)
    overfitting, values = validation.Overfitting(workdir / "metrics.jsonl"), {}
    learning_rate = learning_rate_schedule(setup.optimizer)

    batch = next(batches)
    for step in range(first_step + 1, config.steps + 1):
        profile(step, state)
        with jax.transfer_guard("disallow"):
            state, metrics = step_fn(state, batch, run_key, program.teacher_variables)
        meter.add(metrics)
        if step < config.steps:
            with meter.waiting("data_wait"):
                batch = next(batches)

        stop = told_to_stop(step)
        save = due(config.checkpoint_every, step) or stop or saver.failed()
        keep = due(config.snapshot_every, step) or snapshots.failed()
        if save or keep or due(config.log_every, step):
            # Also before a checkpoint: nothing that is not finite is ever saved.
            values, seconds = meter.collect()
            values |= monitor.speed(seconds, config.batch_size, flops) | monitor.memory()
            values |= jax.device_get(monitor.ema_distance(state))
            values["train/learning_rate"] = learning_rate(step - 1)
            writer.scalars(step, values)
            if stages.is_leader():
                shown = {k: values[f"train/{k}"] for k in ("loss", "mse", "grad_norm")}
                line = progress_line(step, config.steps, shown, config.batch_size, seconds)
                print(line, flush=True)
        with meter.waiting("pause"):
            if evaluation and due(config.eval_every, step):
                found = evaluation.values(state, meta)
                writer.scalars(step, found)
                stages.report_losses(*overfitting.compare(step, found, values))
            if evaluation and config.sample_clips and due(config.sample_every, step):
                evaluation.sounds(state, writer)
            if keep:
                averages.save_snapshot(snapshots, state)
            if save:
                saver.save(step, state.saved(), meta, wait=stop)
                writer.flush()
        if stop and step < config.steps:
            raise preemption.Preempted(f"SIGTERM: step {step} is saved in {workdir}")

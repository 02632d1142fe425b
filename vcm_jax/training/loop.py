"""The story of a run: mesh, data, init or restore, loop, log, evaluate, save."""

import contextlib
import functools
import json
import time
from pathlib import Path

import jax
from absl import logging
from clu import parameter_overview
from ml_collections import ConfigDict

from vcm_jax.codec import load_codec
from vcm_jax.devices import distributed, preemption, sharding
from vcm_jax.records import mixture
from vcm_jax.records.schema import RecordError
from vcm_jax.runs import checkpoint
from vcm_jax.training import monitor, resume, validation
from vcm_jax.training.monitor import NonFiniteError as NonFiniteError
from vcm_jax.training.setup import (
    SetupError,
    describe_run,
    initial_stats,
    kept_statistics,
    read_setup,
)
from vcm_jax.training.state import learning_rate_schedule, make_init, make_optimizer
from vcm_jax.training.step import abstract_batch, train_step
from vcm_jax.training.writer import Writer, progress_line


def _due(every: int, step: int, *, steps: int) -> bool:
    """Whether something done every so many steps (0: never) is due; the last step always is."""
    return bool(every) and (step == steps or step % every == 0)


def train(config: ConfigDict, workdir: str, dry_run: bool = False) -> None:
    """Trains as `config` says; resumes where the latest checkpoint in `workdir` is.

    With `dry_run` it compiles the step for the configured mesh, prints what it takes, and writes
    nothing.

    Raises:
      SetupError: when config, data, devices and checkpoint do not fit together.
      NonFiniteError: when the loss is no longer finite; the last checkpoint is good.
      StorageError: when nothing can be saved any more; the last checkpoint is good.
      Preempted: after a SIGTERM, when the state is saved.
    """
    try:
        # However the run ends, a checkpoint that is being written in the background is finished.
        with contextlib.ExitStack() as stack:
            _train(config, Path(workdir), stack, dry_run)
    except (RecordError, checkpoint.CheckpointError, resume.ResumeError) as error:
        raise SetupError(str(error)) from error


def _train(config: ConfigDict, workdir: Path, stack: contextlib.ExitStack, dry_run: bool) -> None:
    setup = read_setup(config, without_data=dry_run)
    mesh, net, model = setup.mesh, setup.net, setup.model
    leader = jax.process_index() == 0

    # Init: shapes, then shardings, then either a jitted init or the checkpoint, both straight onto
    # the devices.
    optimizer = make_optimizer(setup.optimizer)
    key = jax.random.key(config.seed)
    stats, params = initial_stats(setup), None
    abstract = jax.eval_shape(make_init(net, stats, optimizer, config.ema_sigma_rels), key)
    if config.init_from and checkpoint.latest_step(workdir) is None:
        start = checkpoint.restore_weights(config.init_from)
        params = start["params"]
        checkpoint.check_shapes(params, abstract.params, f"init_from {config.init_from}")
        stats |= kept_statistics(start["stats"], stats, config.init_from)
    init = make_init(net, stats, optimizer, config.ema_sigma_rels)
    shardings = sharding.state_shardings(abstract, mesh, model.num_heads)
    layout = sharding.Layout(mesh, shardings.params)
    rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)

    # The step, compiled ahead of the loop and, in a dry run, ahead of everything else.
    step_fn = jax.jit(
        functools.partial(
            train_step, net=net, optimizer=optimizer, config=setup.step, layout=layout,
            teacher=setup.teacher, accumulate=config.accumulate,
            skip_nonfinite=config.on_nonfinite == "skip",
        ),
        in_shardings=(shardings, rows, whole, whole), out_shardings=(shardings, whole),
        donate_argnums=0,
    )  # fmt: skip
    batch = abstract_batch(model, config.batch_size)
    teacher_variables = jax.device_put(setup.teacher_variables, whole)

    def compile_step():
        logging.info("compiling the step")
        started = time.perf_counter()
        compiled = step_fn.lower(abstract, batch, key, teacher_variables).compile()
        logging.info("compiled the step in %.1f s", time.perf_counter() - started)
        counted = monitor.model_flops(model, setup.step, compiled, batch)
        logging.info("model FLOPs: %.4g G a sample, %s", counted[0] / 1e9, counted[1])
        return compiled, counted[0]

    if dry_run:
        print(dry_run.describe(*compile_step(), abstract, shardings, batch, mesh))
        return

    checkpoint.check_writable(workdir)
    saver = stack.enter_context(
        checkpoint.Saver(checkpoint.open_manager(workdir, config.keep_every or None))
    )
    snapshots = stack.enter_context(checkpoint.Saver(checkpoint.open_snapshots(workdir)))
    meta = resume.describe(
        json.loads(config.to_json_best_effort()), config.data.sources, setup.sources
    )
    if saver.manager.latest_step() is None:
        state = jax.jit(init, out_shardings=shardings)(key, params)
        if leader:
            overview = parameter_overview.get_parameter_overview(state.params, include_stats=False)
            logging.info("\n%s", overview)
    else:
        saved = checkpoint.read_meta(saver.manager, saver.manager.latest_step())
        for line in resume.check(saved, meta, config.allow_config_change):
            logging.warning("other than before: %s", line)
        state = checkpoint.restore(saver.manager, sharding.place(abstract, shardings))
        logging.info("resuming after step %d", int(state.step))
    first_step = int(state.step)
    if first_step >= config.steps:
        logging.info("%s is complete: %d of %d steps", workdir, first_step, config.steps)
        return
    snapshots.drop_after(first_step)
    due = functools.partial(_due, steps=config.steps)
    if first_step and due(config.snapshot_every, first_step):
        if first_step not in snapshots.manager.all_steps():  # killed before it was written
            checkpoint.save_snapshot(snapshots, state)
    if leader:
        describe_run(workdir, config, model, setup.sources[0])
    fold = lambda key: [jax.random.fold_in(key, i) for i in (1, 2)]
    run_key, val_key = jax.jit(fold, out_shardings=whole)(key)
    told_to_stop = stack.enter_context(preemption.watch())
    step_fn, flops = compile_step()
    distributed.wait_for_all("compiled")

    # Data: every process reads its rows of the global batch, onto its devices.
    shapes = mixture.Shapes(
        clip=(model.clip_seq_len, model.clip_dim), sync=(model.sync_seq_len, model.sync_dim)
    )
    part, parts = sharding.process_part(mesh, config.batch_size)
    logging.info(
        "process %d of %d with %d devices reads part %d of %d of every batch",
        jax.process_index(), jax.process_count(), jax.local_device_count(), part, parts,
    )  # fmt: skip
    mixed = mixture.mix(setup.sources, setup.weights, config.seed)
    read = functools.partial(
        mixture.batches, shapes=shapes, batch_size=config.batch_size, part=part, parts=parts
    )
    put = lambda where: (
        lambda batch: jax.tree.map(
            lambda a: jax.make_array_from_process_local_data(where, a), batch
        )
    )
    to_device = put(rows)
    data = read(
        mixed, first_step=first_step, last_step=config.steps, num_workers=config.data.num_workers
    )
    evaluation = None
    if setup.val:
        val = mixture.mix(*setup.val, seed=0)
        clips = mixture.batches(
            val, shapes, batch_size=max(config.sample_clips, 1), first_step=0, last_step=1
        )
        batches = list(read(val, first_step=0, last_step=config.eval_batches))
        best = None
        if config.eval_every and config.eval_sample_steps:
            name = f"val/log_mel_fd_{config.eval_sample_steps[0]}_steps"
            best = validation.Best(workdir, name)
            if leader:
                describe_run(best.folder, config, model, setup.sources[0])
        evaluation = monitor.Evaluation(
            net, setup.step, layout, val_key,
            batches=lambda: map(to_device, batches), clips=put(whole)(next(clips)),
            codec=load_codec(setup.sources[0].path / "codec"),
            teacher=setup.teacher, teacher_variables=teacher_variables,
            best=best, figure_steps=config.eval_sample_steps,
            max_clips=min(config.eval_clips, sum(map(len, setup.val[0]))),  # none is heard twice
        )  # fmt: skip

    writer = stack.enter_context(contextlib.closing(Writer(workdir, first_step, enabled=leader)))
    if setup.profile and first_step >= setup.profile[0]:
        logging.warning("config.profile: step %d is done, there is no trace", setup.profile[0])
    profile = stack.enter_context(
        contextlib.closing(monitor.Profile(setup.profile if leader else None, workdir))
    )
    meter = monitor.Meter(
        first_step, config.on_nonfinite,
        record_ids=lambda step: mixture.record_ids(mixed, step - 1, config.batch_size),
        report=workdir / "nonfinite.jsonl" if leader else None,
    )  # fmt: skip
    learning_rate = learning_rate_schedule(setup.optimizer)

    batch = to_device(next(data))
    for step in range(first_step + 1, config.steps + 1):
        profile(step, state)
        with jax.transfer_guard("disallow"):
            state, metrics = step_fn(state, batch, run_key, teacher_variables)
        meter.add(metrics)
        if step < config.steps:
            with meter.waiting("data_wait"):
                batch = to_device(next(data))

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
            if leader:
                shown = {k: values[f"train/{k}"] for k in ("loss", "mse", "grad_norm")}
                line = progress_line(step, config.steps, shown, config.batch_size, seconds)
                print(line, flush=True)
        with meter.waiting("pause"):
            if evaluation and due(config.eval_every, step):
                writer.scalars(step, evaluation.values(state, meta))
            if evaluation and config.sample_clips and due(config.sample_every, step):
                evaluation.sounds(state, writer)
            if keep:
                checkpoint.save_snapshot(snapshots, state)
            if save:
                saver.save(step, state, meta, wait=stop)
                writer.flush()
        if stop and step < config.steps:
            raise preemption.Preempted(f"SIGTERM: step {step} is saved in {workdir}")

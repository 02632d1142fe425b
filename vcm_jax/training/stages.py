"""The stages of a run before its loop: start or resume, open the data, prepare the evaluation."""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from absl import logging
from clu import parameter_overview
from ml_collections import ConfigDict

from vcm_jax import weights
from vcm_jax.claim import hold
from vcm_jax.codec import load_codec
from vcm_jax.devices import sharding
from vcm_jax.models.mmdit import GUIDANCE_INPUT
from vcm_jax.records import mixture
from vcm_jax.runs import averages, checkpoint, description
from vcm_jax.training import monitor, resume, validation
from vcm_jax.training.program import Program
from vcm_jax.training.setup import Setup, kept_statistics
from vcm_jax.training.state import TrainState


def is_leader() -> bool:
    """Whether this process writes logs and descriptions: the first of a run's processes."""
    return jax.process_index() == 0


@dataclasses.dataclass(frozen=True)
class Start:
    """What a run starts from.

    Attributes:
      stats: the network's collection "stats".
      params: all of the network's parameters, on the host; None for random ones, or where a
        checkpoint holds them all.
      base: where the parameters are from that are not trained; None if all are trained.
    """

    stats: dict
    params: dict | None = None
    base: weights.Base | None = None

    def described_base(self) -> dict | None:
        """The base as JSON."""
        return dataclasses.asdict(self.base) if self.base else None


def read_start(config: ConfigDict, workdir: Path, program: Program) -> Start:
    """What a new run starts from, and what a resumed one needs beside its checkpoint.

    With `config.init_from` that comes from a run, from imported or from public weights.

    Raises:
      CheckpointError: the weights are not there, or have other shapes than this run's.
      PretrainedError: public weights that cannot be fetched, or are damaged.
    """
    selection, model = program.setup.selection, program.setup.model
    objective, stats = program.setup.step.objective, program.stats
    resumes = checkpoint.latest_step(workdir) is not None
    if objective.teacher_velocity and not resumes:
        # The teacher's velocity is one of latents that are normalised as in its own training.
        theirs = program.setup.teacher_variables["stats"]
        stats = stats | kept_statistics(theirs, stats, objective.teacher)
    if not config.init_from or (resumes and selection.is_whole):
        return Start(stats)
    found = weights.read(config.init_from)
    weights.check_sizes(found["params"], model, f"init_from {config.init_from}")
    kept = kept_statistics(found["stats"], program.stats, config.init_from)
    if objective.teacher_velocity and not resumes:
        _check_like_teacher(kept, stats, config.init_from, objective.teacher)
    base = None
    if not selection.is_whole:
        if GUIDANCE_INPUT in program.abstract.frozen and GUIDANCE_INPUT not in found["params"]:
            raise checkpoint.CheckpointError(
                f"init_from {config.init_from} has no input for guidance, which must be trained "
                f"then: give --config.optimizer.train_only=\"('{GUIDANCE_INPUT}',)\""
            )
        place = weights.place_of(config.init_from)
        base = weights.Base(place, weights.hash_params(found["params"]))
    return Start(stats | kept, found["params"], base)


def _check_like_teacher(kept, stats, start: str, teacher: str) -> None:
    """Raises CheckpointError if weights to start from have other latents than a teacher."""
    if any(not np.allclose(kept[name], stats[name], rtol=1e-3, atol=1e-5) for name in kept):
        raise checkpoint.CheckpointError(
            f"init_from {start} and objective.teacher {teacher} normalise latents differently: "
            "start from the teacher's weights, or give no init_from"
        )


def open_checkpoints(
    config: ConfigDict, workdir: Path, stack: contextlib.ExitStack
) -> tuple[checkpoint.Saver, checkpoint.Saver]:
    """(saver of checkpoints, saver of EMA snapshots); both finish their saves when they close.

    The workdir stays locked until `stack` is closed.

    Raises:
      ClaimError: another run works in the workdir.
      StorageError: the workdir cannot be written to.
    """
    checkpoint.check_writable(workdir)
    if is_leader():
        stack.enter_context(hold(workdir))
    managers = (
        checkpoint.open_manager(workdir, config.keep_every or None),
        averages.open_snapshots(workdir),
    )
    saver, snapshots = (stack.enter_context(checkpoint.Saver(manager)) for manager in managers)
    return saver, snapshots


def describe_run(config: ConfigDict, setup: Setup, start: Start) -> dict:
    """What every checkpoint says about its run; a resumed run is compared with it."""
    settings = json.loads(config.to_json_best_effort())
    return resume.describe(settings, config.data.sources, setup.sources, start.described_base())


def init_or_restore(
    config: ConfigDict,
    workdir: Path,
    program: Program,
    start: Start,
    saver: checkpoint.Saver,
    meta: dict,
) -> TrainState:
    """The state that the loop starts from: a new one, or that of the latest whole checkpoint.

    Damaged checkpoints after that one are moved aside, and the log says so. If all are damaged,
    nothing is moved: the run must not start again from step 0 without being told to.

    Args:
      config, workdir: of the run.
      program: its shapes and shardings.
      start: from `read_start`.
      saver: of the checkpoints.
      meta: from `describe_run`.

    Raises:
      ResumeError: the checkpoint is another run's.
      CheckpointError: a checkpoint cannot be read, or all of them are damaged.
    """
    steps = sorted(saver.manager.all_steps(), reverse=True)
    if not steps:
        state = program.init(start.stats, start.params)
        if is_leader():
            overview = parameter_overview.get_parameter_overview(state.params, include_stats=False)
            logging.info("\n%s", overview)
        return state
    target = sharding.place(program.abstract.saved(), program.shardings.saved())
    for place, step in enumerate(steps):
        try:
            saved = checkpoint.read_meta(saver.manager, step)
            changes = resume.check(saved, meta, config.allow_config_change)
            state = checkpoint.restore(saver.manager, target, step)
        except checkpoint.DamagedError as error:
            if jax.process_count() > 1 and isinstance(error, checkpoint.UnreadableError):
                raise  # other processes may have read it, and are waiting for this one
            logging.warning("%s", error)
            continue
        for damaged in steps[:place]:
            kept = checkpoint.set_aside(saver.manager, workdir, damaged)
            logging.warning("the damaged checkpoint %d is kept as %s", damaged, kept)
        for line in changes:
            logging.warning("changed since the last start: %s", line)
        logging.info("resuming after step %d", int(state["step"]))
        return TrainState(**state, frozen=program.freeze(start.params))
    raise checkpoint.CheckpointError(
        f"{saver.manager.directory}: all checkpoints are damaged ({', '.join(map(str, steps))}): "
        "delete this folder to start again from step 0, or give another --workdir"
    )


def align_snapshots(snapshots: checkpoint.Saver, state: TrainState, due: bool) -> None:
    """Makes the snapshots those of the state: later ones go, and one that is due is saved.

    A run can be killed after a checkpoint was written and before the snapshot of the same step.
    """
    step = int(state.step)
    snapshots.drop_after(step)
    if step and due and step not in snapshots.manager.all_steps():
        averages.save_snapshot(snapshots, state)


def write_description(config: ConfigDict, setup: Setup, start: Start, workdir: Path) -> None:
    """Writes run.json and the codec, which generating needs beside the weights."""
    first = setup.sources[0]
    settings = json.loads(config.to_json_best_effort())
    codec, base = first.path / "codec", start.described_base()
    description.write(workdir, settings, setup.model, first.manifest, codec, base)


def _put(batch, where):
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(where, a), batch)


def _shapes(setup: Setup) -> mixture.Shapes:
    model = setup.model
    return mixture.Shapes(
        clip=(model.clip_seq_len, model.clip_dim), sync=(model.sync_seq_len, model.sync_dim)
    )


def _reader(config: ConfigDict, setup: Setup):
    """`mixture.batches` of the rows of every global batch that this process reads."""
    index, count = sharding.process_part(setup.mesh, config.batch_size)
    return functools.partial(
        mixture.batches,
        shapes=_shapes(setup),
        batch_size=config.batch_size,
        process=index,
        processes=count,
    )


def open_data(
    config: ConfigDict, setup: Setup, program: Program, first_step: int
) -> tuple[mixture.Mixture, Iterator[dict]]:
    """(the mixture of the sources, batches on the devices from the step after `first_step` on).

    Every process reads its rows of each global batch.
    """
    index, count = sharding.process_part(setup.mesh, config.batch_size)
    logging.info(
        "process %d of %d with %d devices reads block %d of %d of every batch",
        jax.process_index(),
        jax.process_count(),
        jax.local_device_count(),
        index,
        count,
    )
    mixed = mixture.mix(setup.sources, setup.weights, config.seed)
    batches = _reader(config, setup)(
        mixed,
        first_step=first_step,
        last_step=config.steps,
        num_workers=config.data.num_workers,
    )
    return mixed, (_put(batch, program.rows) for batch in batches)


def make_evaluation(
    config: ConfigDict, program: Program, start: Start, workdir: Path, key
) -> monitor.Evaluation | None:
    """What is evaluated and listened to while the run trains; None without validation data."""
    setup = program.setup
    if not setup.val:
        return None
    val = mixture.mix(*setup.val, seed=0)
    heard = mixture.batches(
        val, _shapes(setup), batch_size=max(config.sample_clips, 1), first_step=0, last_step=1
    )
    batches = list(_reader(config, setup)(val, first_step=0, last_step=config.eval_batches))
    best = None
    if config.eval_every and config.eval_sample_steps:
        metric = f"val/log_mel_fd_{config.eval_sample_steps[0]}_steps"
        best = validation.Best(workdir, metric)
        if is_leader():
            write_description(config, setup, start, best.folder)
    return monitor.Evaluation(
        setup.net,
        setup.step,
        program.layout,
        key,
        batches=lambda: (_put(batch, program.rows) for batch in batches),
        clips=_put(next(heard), program.whole),
        codec=load_codec(setup.sources[0].path / "codec"),
        teacher=setup.teacher,
        teacher_variables=program.teacher_variables,
        best=best,
        sample_steps=config.eval_sample_steps,
        max_clips=min(config.eval_clips, sum(map(len, setup.val[0]))),  # each clip once
        selection=setup.selection,
    )


def report_losses(line: str, warning: str) -> None:
    """Shows what `validation.Overfitting.compare` returns."""
    if is_leader() and line:
        print(line, flush=True)
    if is_leader() and warning:
        logging.warning("%s", warning)


def open_profile(
    setup: Setup, workdir: Path, first_step: int, stack: contextlib.ExitStack
) -> monitor.Profile:
    """Takes the trace that `config.profile` asks for; it is ended with the run at the latest."""
    if setup.profile and first_step >= setup.profile[0]:
        logging.warning("config.profile: step %d is done, there is no trace", setup.profile[0])
    span = setup.profile if is_leader() else None
    return stack.enter_context(contextlib.closing(monitor.Profile(span, workdir)))


def make_meter(
    config: ConfigDict, mixed: mixture.Mixture, workdir: Path, first_step: int
) -> monitor.Meter:
    """Averages the metrics of the steps, and stops the run when a loss is not finite."""
    return monitor.Meter(
        first_step,
        config.on_nonfinite,
        record_ids=lambda step: mixture.record_ids(mixed, step - 1, config.batch_size),
        report=workdir / "nonfinite.jsonl" if is_leader() else None,
    )

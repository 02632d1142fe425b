"""The story of a run: mesh, data, init or restore, loop, log, evaluate, save."""

import contextlib
import dataclasses
import functools
import json
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from clu import parameter_overview
from ml_collections import ConfigDict

from vcm_jax import checkpoint, sharding, validation
from vcm_jax.atomic import atomic_path
from vcm_jax.codec import copy_codec, load_codec
from vcm_jax.data import mixture
from vcm_jax.data.records import RecordError, RecordSource
from vcm_jax.models import MODELS, MMDiT, ModelConfig
from vcm_jax.objectives import read_section
from vcm_jax.teacher import load_teacher
from vcm_jax.train_state import (
    OptimizerConfig,
    learning_rate_schedule,
    make_init,
    make_optimizer,
)
from vcm_jax.train_step import StepConfig, check_network, loss_fn, train_step
from vcm_jax.writer import Writer, progress_line


class SetupError(ValueError):
    """A run that cannot start as it is configured; one line."""


class NonFiniteError(ArithmeticError):
    """A loss or gradient that is not finite; one line that names the step."""


DTYPES = ("float32", "bfloat16")


def _dataclass_from(cls, config, section: str, **extra):
    """`cls(**config)`, naming keys that the section of the config does not have or must not."""
    known = {field.name for field in dataclasses.fields(cls)} - extra.keys()
    if unknown := set(config) - known:
        raise SetupError(
            f"config.{section} has unknown keys {sorted(unknown)}; it knows {sorted(known)}"
        )
    return cls(**config, **extra)


def step_config(config: ConfigDict) -> StepConfig:
    """The training step's settings from `config.objective` and `config.steps`."""
    objective, dropout = read_section(config.objective)
    return _dataclass_from(
        StepConfig, dropout, "objective", steps=config.steps, objective=objective
    )


def model_config(config: ConfigDict, manifest) -> ModelConfig:
    """The network's sizes: of the named model, with lengths that follow the data's duration."""
    if config.model not in MODELS:
        raise SetupError(f"config.model {config.model!r} is not one of {', '.join(MODELS)}")
    sizes = dataclasses.asdict(MODELS[config.model].with_lengths(manifest.sequence))
    sizes |= {name: value for name, value in config.model_overrides.items() if value is not None}
    model = _dataclass_from(ModelConfig, sizes, "model_overrides")
    for name, width in (
        ("latent_dim", manifest.latent_dim),
        ("clip_dim", manifest.encoders["clip_dim"]),
        ("sync_dim", manifest.encoders["sync_dim"]),
        ("text_dim", manifest.encoders["text_dim"]),
    ):
        if getattr(model, name) != width:
            raise SetupError(
                f"the records have {name} {width}, model {config.model} has "
                f"{getattr(model, name)}: extract with that size or set model_overrides.{name}"
            )
    return model


def open_sources(texts, directory: str, key: str, like: RecordSource | None = None):
    """([RecordSource], weights) of the 'PATH=WEIGHT' strings of `config.data.KEY`.

    Raises:
      SetupError: when they differ from each other, or from `like`, in what makes features and
        latents.
    """
    parsed = [mixture.parse_source(text) for text in texts]
    if not parsed:
        raise SetupError(f"config.data.{key} is empty: name at least one 'PATH=WEIGHT'")
    sources = [RecordSource(Path(directory) / path) for path, _ in parsed]
    like = like or sources[0]
    for source in sources:
        for what in ("sequence", "encoders", "codec"):
            ours, theirs = getattr(like.manifest, what), getattr(source.manifest, what)
            if ours != theirs:
                raise SetupError(
                    f"{source.path} and {like.path} differ in their {what}: {theirs} and {ours}"
                )
        source.check_statistics()
    weights = [weight for _, weight in parsed]
    mixture.check_sources(sources, weights)
    return sources, weights


def mixed_statistics(sources, weights) -> dict[str, np.ndarray]:
    """Mean and std per channel of the latents of a weighted mixture, float32 `C` each."""
    share = np.divide(weights, sum(weights))
    means = np.stack([source.manifest.latent_mean for source in sources])
    squares = np.stack([source.manifest.latent_std for source in sources]) ** 2 + means**2
    mean = share @ means
    std = np.sqrt(share @ squares - mean**2)
    return {"latent_mean": np.float32(mean), "latent_std": np.float32(std)}


def kept_statistics(start: dict, data: dict, folder) -> dict[str, np.ndarray]:
    """The latents' mean and std that stay with the weights which training starts from.

    A network is good for latents that are normalised as in its own training; where the data's
    statistics are others, its start would be off. The log says by how much they differ, and warns
    where that looks like another codec.
    """
    kept = {name: start[name] for name in ("latent_mean", "latent_std") if name in start}
    if len(kept) < 2:
        return {}
    shift = np.abs((data["latent_mean"] - kept["latent_mean"]) / kept["latent_std"]).max()
    factor = np.exp(np.abs(np.log(data["latent_std"] / kept["latent_std"])).max())
    alike = shift < 0.5 and factor < 1.5
    logging.log(
        logging.INFO if alike else logging.WARNING,
        "latents are normalised with the statistics of %s: the data's means differ by up to %.2g "
        "of its stds, and stds by a factor of up to %.3g%s",
        folder, shift, factor, "" if alike else ": are the data's latents those of another codec?",
    )  # fmt: skip
    return kept


def describe_run(workdir: Path, config: ConfigDict, model: ModelConfig, source) -> None:
    """Writes what `generate` needs beside the weights: run.json and the codec."""
    run = {
        "config": json.loads(config.to_json_best_effort()),
        "model": dataclasses.asdict(model),
        "sequence": dataclasses.asdict(source.manifest.sequence),
        "encoders": source.manifest.encoders,
        "codec": source.manifest.codec,
    }
    with atomic_path(workdir / "run.json") as path:
        path.write_text(json.dumps(run, indent=1))
    if not (workdir / "codec").exists():
        temporary = workdir / ".codec.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        copy_codec(source.path / "codec", temporary)
        temporary.rename(workdir / "codec")


def evaluate(eval_step, state, batches, key, *args) -> dict[str, float]:
    """The objective on fixed validation batches at fixed times and noise, with averaged weights."""
    params = next(iter(state.ema.values()))
    found = None
    for i, batch in enumerate(batches):
        step_key = jax.random.fold_in(key, i)
        metrics = eval_step(params, state.stats, batch, step_key, state.step, *args)
        metrics = jax.device_get(metrics)
        found = metrics if found is None else {k: v.merge(metrics[k]) for k, v in found.items()}
    return {f"val/{name}": float(value.compute()) for name, value in found.items()}


def changes(before: dict, now: dict, prefix: str = "config") -> list[str]:
    """Which values differ between two configs, a line each."""
    lines = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += changes(old, new, f"{prefix}.{key}")
        elif old != new:
            lines.append(f"{prefix}.{key} is {new!r}, was {old!r}")
    return lines


def collect(pending, first_step: int) -> dict[str, float]:
    """Averages of the metrics of some steps; waits for them.

    Raises:
      NonFiniteError: when a loss or gradient norm is not finite.
    """
    pending = jax.device_get(pending)
    for i, metrics in enumerate(pending):
        for name in ("loss", "grad_norm"):
            value = getattr(metrics, name).compute()
            if not np.isfinite(value):
                raise NonFiniteError(f"{name} is {value} at step {first_step + i + 1}")
    with np.errstate(invalid="ignore"):  # an empty bin of t averages to NaN, and is not logged
        merged = functools.reduce(lambda a, b: a.merge(b), pending).compute()
    return {f"train/{name}": float(value) for name, value in merged.items()}


def _due(every: int, step: int, steps: int) -> bool:
    """Whether something done every so many steps (0: never) is due; the last step always is."""
    return bool(every) and (step == steps or step % every == 0)


def train(config: ConfigDict, workdir: str) -> None:
    """Trains as `config` says; resumes where the latest checkpoint in `workdir` is.

    Raises:
      SetupError: when config, data, devices and checkpoint do not fit together.
      NonFiniteError: when the loss is no longer finite; the last checkpoint is good.
    """
    try:
        # However the run ends, a checkpoint that is being written in the background is finished.
        with contextlib.ExitStack() as stack:
            _train(config, Path(workdir), stack)
    except (RecordError, checkpoint.CheckpointError) as error:
        raise SetupError(str(error)) from error


def _train(config: ConfigDict, workdir: Path, stack: contextlib.ExitStack) -> None:
    with _setup_errors():
        mesh = sharding.make_mesh(**config.mesh)
        sharding.check_batch_size(config.batch_size, mesh)
        if config.dtype not in DTYPES:
            raise SetupError(f"config.dtype {config.dtype!r} is not one of {', '.join(DTYPES)}")
        sources, weights = open_sources(config.data.sources, config.data.dir, "sources")
        val = None
        if config.data.val_sources and config.eval_every:
            val = open_sources(config.data.val_sources, config.data.dir, "val_sources", sources[0])
        model = model_config(config, sources[0].manifest)
        settings = step_config(config)
        optimizer_config = _dataclass_from(OptimizerConfig, dict(config.optimizer), "optimizer")
        net = MMDiT(model, dtype=jnp.dtype(config.dtype))
        check_network(net, settings)
        teacher, teacher_variables = load_teacher(
            settings.objective, net, sources[0].manifest.codec
        )
    leader = jax.process_index() == 0

    # Init: shapes, then shardings, then either a jitted init or the checkpoint, both straight onto
    # the devices.
    optimizer = make_optimizer(optimizer_config)
    key = jax.random.key(config.seed)
    stats = mixed_statistics(sources, weights) | {"empty_text": sources[0].empty_text}
    abstract = jax.eval_shape(make_init(net, stats, optimizer, config.ema_sigma_rels), key)
    params = None
    if config.init_from:
        start = checkpoint.restore_weights(config.init_from)
        params = start["params"]
        checkpoint.check_shapes(params, abstract.params, f"init_from {config.init_from}")
        stats |= kept_statistics(start["stats"], stats, config.init_from)
    init = make_init(net, stats, optimizer, config.ema_sigma_rels)
    shardings = sharding.state_shardings(abstract, mesh, model.num_heads)
    if leader:
        workdir.mkdir(parents=True, exist_ok=True)
    manager = stack.enter_context(
        checkpoint.open_manager(workdir, keep_every=config.keep_every or None)
    )
    if manager.latest_step() is None:
        state = jax.jit(init, out_shardings=shardings)(key, params)
        logging.info(
            "\n%s", parameter_overview.get_parameter_overview(state.params, include_stats=False)
        )
    else:
        target = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings
        )
        state, saved = checkpoint.restore(manager, target)
        logging.info("resuming after step %d", int(state.step))
        for line in changes(saved["config"], json.loads(config.to_json_best_effort())):
            logging.warning("other than before: %s", line)
    first_step = int(state.step)
    if first_step >= config.steps:
        logging.info("%s is complete: %d of %d steps", workdir, first_step, config.steps)
        return
    if leader:
        describe_run(workdir, config, model, sources[0])

    # Data: every process reads its rows of the global batch.
    shapes = mixture.Shapes(
        clip=(model.clip_seq_len, model.clip_dim), sync=(model.sync_seq_len, model.sync_dim)
    )
    rows = sharding.batch_sharding(mesh)
    to_device = lambda batch: jax.tree.map(
        lambda a: jax.make_array_from_process_local_data(rows, a), batch
    )
    read = functools.partial(
        mixture.batches, shapes=shapes, batch_size=config.batch_size,
        part=jax.process_index(), parts=jax.process_count(),
    )  # fmt: skip
    data = read(
        mixture.mix(sources, weights, config.seed), first_step=first_step, last_step=config.steps,
        num_workers=config.data.num_workers,
    )  # fmt: skip
    val_batches = []
    if val:
        val_batches = list(
            read(mixture.mix(*val, seed=0), first_step=0, last_step=config.eval_batches)
        )

    # The step: compiled once, ahead of the loop.
    whole = sharding.replicated(mesh)
    constrain = lambda tree: jax.lax.with_sharding_constraint(tree, rows)
    step_fn = jax.jit(
        functools.partial(
            train_step,
            net=net,
            optimizer=optimizer,
            config=settings,
            constrain=constrain,
            teacher=teacher,
        ),
        in_shardings=(shardings, rows, whole, whole),
        out_shardings=(shardings, whole),
        donate_argnums=0,
    )
    eval_step = jax.jit(
        lambda *args: loss_fn(
            *args, net=net, config=settings, constrain=constrain, teacher=teacher
        )[1],
        out_shardings=whole,
    )
    run_key, val_key = (jax.device_put(jax.random.fold_in(key, i), whole) for i in (1, 2))
    teacher_variables = jax.device_put(teacher_variables, whole)
    learning_rate = learning_rate_schedule(optimizer_config)
    writer = stack.enter_context(contextlib.closing(Writer(workdir, first_step, enabled=leader)))
    meta = {"config": json.loads(config.to_json_best_effort())}
    best = None
    if val_batches and config.eval_sample_steps:
        codec = load_codec(sources[0].path / "codec")
        max_clips = min(config.eval_clips, sum(map(len, val[0])))  # none is looked at twice
        best = validation.Best(workdir, f"val/log_mel_fd_{config.eval_sample_steps[0]}_steps")
        if leader:
            describe_run(best.folder, config, model, sources[0])

    logging.info("compiling the step")
    started = time.perf_counter()
    batch = to_device(next(data))
    step_fn = step_fn.lower(state, batch, run_key, teacher_variables).compile()
    logging.info("compiled the step in %.1f s", time.perf_counter() - started)

    pending, pending_from = [], first_step
    tick, waited = time.perf_counter(), 0.0
    for step in range(first_step + 1, config.steps + 1):
        with jax.transfer_guard("disallow"):
            state, metrics = step_fn(state, batch, run_key, teacher_variables)
        pending.append(metrics)
        if step < config.steps:
            before = time.perf_counter()
            batch = to_device(next(data))
            waited += time.perf_counter() - before

        save = _due(config.checkpoint_every, step, config.steps)
        if save or _due(config.log_every, step, config.steps):
            # Also before a checkpoint: nothing that is not finite is ever saved.
            values = collect(pending, pending_from)
            now = time.perf_counter()
            seconds = (now - tick) / (step - pending_from)
            values |= {
                "train/learning_rate": float(learning_rate(step - 1)),
                "speed/samples_per_s": config.batch_size / seconds,
                "speed/data_wait": waited / (now - tick),
            }
            writer.scalars(step, values)
            if leader:
                shown = {k: values[f"train/{k}"] for k in ("loss", "mse", "grad_norm")}
                line = progress_line(step, config.steps, shown, config.batch_size, seconds)
                print(line, flush=True)
            pending, pending_from = [], step
            tick, waited = now, 0.0
        if val_batches and _due(config.eval_every, step, config.steps):
            values = evaluate(
                eval_step, state, map(to_device, val_batches), val_key, teacher_variables
            )
            if best is not None:
                averaged = next(iter(state.ema.values()))
                values |= validation.figures(
                    net, averaged, state.stats, map(to_device, val_batches), codec, val_key,
                    steps=config.eval_sample_steps, max_clips=max_clips, place=whole,
                    objective=settings.objective,
                )  # fmt: skip
                best.offer(state, values, meta)
            writer.scalars(step, values)
            tick = time.perf_counter()
        if save:
            checkpoint.save(manager, state, meta)
            writer.flush()


@contextlib.contextmanager
def _setup_errors():
    """Settings are checked where they are used; here their errors get one name."""
    try:
        yield
    except ValueError as error:
        raise SetupError(str(error)) from error

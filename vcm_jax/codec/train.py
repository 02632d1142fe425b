"""Trains a codec on one's own sounds.

    python -m vcm_jax.codec.train --sounds=DIR --out=CODEC
    python -m vcm_jax.codec.train --sounds=DIR --out=CODEC --linear_codec=RECORDS/codec
    python -m vcm_jax.codec.train --sounds=DIR --out=CODEC --size=base --encoder=learned

DIR has sound files, or videos with sound. CODEC is then a folder for --codec of extraction and
generation; CODEC/training keeps checkpoints, TensorBoard events and the decoded sounds. If
interrupted, rerun the same command: it resumes. By default the latents are principal components of
the spectrogram, and minutes on two cores are enough; the second example decodes the latents of
records that exist already, the third one takes hours on a GPU. Files without a usable sound are
left out; the exit code is then 3.
"""

import contextlib
import dataclasses
import functools
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from absl import flags, logging
from flax import traverse_util

from vcm_jax.claim import claim, hold
from vcm_jax.cli import LEFT_OUT, cache_note, heading, run
from vcm_jax.codec import LearnedCodec, LinearCodec, fit_linear_codec, load_codec
from vcm_jax.codec.corpus import Corpus, open_corpus
from vcm_jax.codec.fourier import DECODERS
from vcm_jax.codec.linear import LATENT_DIMS, stacked_frames
from vcm_jax.codec.mel import MELS
from vcm_jax.codec.step import CodecConfig, init_state, train_step
from vcm_jax.devices import preemption, sharding
from vcm_jax.metrics.sounds import SoundMetrics
from vcm_jax.runs import checkpoint
from vcm_jax.training import monitor
from vcm_jax.training.writer import Writer, progress_line

_FIT_SOUNDS = 400  # number of sounds that statistics and the linear encoder are fitted on
_HEARD = 4  # validation sounds in TensorBoard
_LONGEST = 10  # s of a validation sound
# The defaults of each size: minutes on two cores, or hours on a GPU.
RECIPES = {
    "tiny": dict(steps=2_400, batch_size=6, crop=32, learning_rate=1.5e-3, warmup_steps=50),
    "base": dict(steps=200_000, batch_size=32, crop=64, learning_rate=5e-4, warmup_steps=1_000),
}


def define_flags():
    flags.DEFINE_string("sounds", None, "Folder of sounds or videos to train on.", required=True)
    flags.DEFINE_string("out", None, "Codec folder to write.", required=True)
    heading("Codec")
    flags.DEFINE_enum("mode", "16k", list(MELS), "Sample rate, 16 or 44.1 kHz.")
    flags.DEFINE_enum("size", "tiny", list(DECODERS), "Size of the networks.")
    flags.DEFINE_enum(
        "encoder", "linear", ["linear", "learned"], "Principal components, or a network."
    )
    flags.DEFINE_string("linear_codec", None, "Codec folder whose linear latents are decoded.")
    flags.DEFINE_integer("latent_dim", None, "Channels of the latents (20 or, at 44.1 kHz, 40).")
    heading("Training")
    flags.DEFINE_integer("steps", None, "Training steps (2400 for tiny, 200000 for base).")
    flags.DEFINE_integer("batch_size", None, "Crops in a batch (6, 32).")
    flags.DEFINE_integer("crop", None, "Latents in a crop (32, 64).")
    flags.DEFINE_float("learning_rate", None, "Peak learning rate (0.0015, 0.0005).")
    flags.DEFINE_float("noise_from", 0.4, "Share of the steps after which noise is drawn.")
    flags.DEFINE_float("kl_weight", 1e-3, "Weight of the divergence of learned latents.")
    flags.DEFINE_bool("adversarial", False, "Train with discriminators, too.")
    flags.DEFINE_integer("seed", 0, "Seed of weights, crops and noise.", 0)
    heading("Validation and logs")
    flags.DEFINE_integer("val_sounds", 16, "Sounds kept for validation, at most a tenth.", 1)
    flags.DEFINE_integer("log_every", 50, "Steps between lines of the log.", 1)
    flags.DEFINE_integer("eval_every", 0, "Steps between validations (0: at the end).", 0)
    flags.DEFINE_integer("checkpoint_every", 1_000, "Steps between checkpoints.", 1)


def read_config(args) -> CodecConfig:
    """The settings of the flags, completed by the size's recipe."""
    given = {
        field.name: getattr(args, field.name)
        for field in dataclasses.fields(CodecConfig)
        if getattr(args, field.name, None) is not None
    }
    recipe = RECIPES[args.size] | {"latent_dim": LATENT_DIMS[args.mode]}
    return CodecConfig(**recipe | given)


def read_statistics(
    corpus: Corpus, numbers, config: CodecConfig, linear: LinearCodec | None
) -> dict[str, np.ndarray]:
    """Arrays that are not trained: of the encoder, and the latents' statistics for the decoder.

    They are the entries of `LearnedCodec.arrays` besides `.../params/...`.

    Args:
      corpus, numbers: the sounds for training.
      config: settings.
      linear: the linear codec whose latents are kept; None fits one.

    Raises:
      ValueError: too few sounds to fit one.
    """
    numbers = np.random.default_rng(0).permutation(numbers)[:_FIT_SOUNDS]
    sounds = (corpus.sound(number) for number in numbers)
    if config.encoder == "learned":
        rows = np.concatenate([stacked_frames(sound, MELS[config.mode]) for sound in sounds])
        unit = {"decoder/mean": np.zeros, "decoder/std": np.ones}
        found = {name: make(config.latent_dim) for name, make in unit.items()}
        found |= {"encoder/mean": rows.mean(0), "encoder/std": rows.std(0) + 1e-3}
    else:
        linear = linear or fit_linear_codec(sounds, config.latent_dim, config.mode)
        latents = [linear.encode(corpus.sound(number))[0] for number in numbers]
        rows = np.concatenate(latents)
        found = {"encoder/mean": linear.mean, "encoder/components": linear.components}
        found |= {"decoder/mean": rows.mean(0), "decoder/std": rows.std(0) + 1e-6}
    return {name: np.asarray(array, np.float32) for name, array in found.items()}


def make_codec(config: CodecConfig, statistics, weights) -> LearnedCodec:
    """The codec of weights, as `CodecState.params` has them, and of `read_statistics`."""
    arrays = dict(statistics)
    for part, tree in jax.device_get(weights).items():
        flat = traverse_util.flatten_dict(tree, sep="/")
        arrays |= {f"{part}/params/{name}": np.asarray(array) for name, array in flat.items()}
    return LearnedCodec(config.mode, config.size, arrays)


def validate(codec: LearnedCodec, sounds, writer: Writer, step: int) -> None:
    """Writes metrics of the round trip of held-out sounds, and the first of these sounds."""
    metrics, seconds = SoundMetrics(codec.sample_rate), []
    for number, sound in enumerate(sounds):
        latents = codec.encode(sound)[0]
        started = time.perf_counter()
        found = codec.decode(latents, seed=number)[: len(sound)]
        seconds.append((time.perf_counter() - started) / len(sound) * codec.sample_rate)
        metrics.add(str(number), found, sound)
        if number < _HEARD:
            writer.sound(step, f"validation sound {number}", found, codec.sample_rate)
            writer.sound(step, f"validation sound {number}, true", sound, codec.sample_rate)
    values = {f"val/{name}": value for name, value in metrics.values().items()}
    values["val/decoding_seconds_per_second"] = float(np.median(seconds))
    writer.scalars(step, values)
    shown = "  ".join(f"{name[4:]} {value:.4g}" for name, value in values.items())
    logging.info("validation: %s", shown)


class _Meter:
    """Averages the metrics of steps, and prints and writes them every so many."""

    def __init__(self, config: CodecConfig, writer: Writer, every: int):
        self.config, self.writer, self.every = config, writer, every
        self.found, self.started = [], None

    def add(self, step: int, metrics, saves: bool) -> None:
        """Adds a step's metrics, arrays on the device; `saves` says whether its state is saved.

        It waits for the step `AHEAD` before this one. With more steps under way, the devices of a
        CPU can wait for each other without end: their threads are all taken by later steps.

        Raises:
          ValueError: the loss is not finite. Nothing that is not finite is ever saved.
        """
        self.found.append(metrics)
        jax.block_until_ready(self.found[: -monitor.AHEAD][-1:])
        if self.started is None:  # the first step of a stage compiles
            jax.block_until_ready(metrics)
            self.started, self.counted = time.perf_counter(), len(self.found)
        if step % self.every and not saves:
            return
        found, steps = jax.device_get(self.found), max(1, len(self.found) - self.counted)
        seconds = (time.perf_counter() - self.started) / steps
        names = found[-1].keys()
        values = {name: float(np.mean([f[name] for f in found if name in f])) for name in names}
        if not np.isfinite(values["loss"]):
            raise ValueError(f"the loss is not finite at step {step}: lower --learning_rate")
        self.writer.scalars(step, {f"train/{name}": value for name, value in values.items()})
        line = progress_line(step, self.config.steps, values, self.config.batch_size, seconds)
        if self.writer.enabled:
            print(line, flush=True)
        self.found, self.counted, self.started = [], 0, time.perf_counter()


def _steps(config: CodecConfig, mesh):
    """{whether it is of the second stage: the jitted step}; compiled when first called."""
    rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    bound = functools.partial(train_step, config=config, mesh=mesh, axes=sharding.BATCH_AXES)
    return {
        noisy: jax.jit(
            functools.partial(bound, noisy=noisy),
            in_shardings=(whole, whole, rows, whole),
            out_shardings=whole,
            donate_argnums=0,
        )
        for noisy in (False, True)
    }


def _val_sounds(corpus: Corpus, numbers, rate: int) -> list[np.ndarray]:
    """The first 10 s of the validation sounds; those too short to measure are left out."""
    sounds = [corpus.sound(number)[: _LONGEST * rate] for number in numbers]
    return [sound for sound in sounds if len(sound) >= 0.1 * rate]


def _batches(corpus: Corpus, numbers, config: CodecConfig, mesh, first: int) -> Iterator:
    """The batches of the steps from `first` on, on the devices."""
    part, parts = sharding.process_part(mesh, config.batch_size)
    rows = slice(*(config.batch_size // parts * i for i in (part, part + 1)))
    size, where = config.crop_samples, sharding.batch_sharding(mesh)
    for step in range(first, config.steps + 1):
        sound = corpus.crops(numbers, size, rows, config.batch_size, config.seed, step)
        yield step, jax.make_array_from_process_local_data(where, sound)


def train(config: CodecConfig, corpus: Corpus, workdir: Path, args, linear=None) -> LearnedCodec:
    """Trains a codec; resumes from the latest checkpoint in `workdir`.

    Args:
      config: settings.
      corpus: the sounds.
      workdir: for checkpoints and events.
      args: val_sounds, log_every, eval_every and checkpoint_every, as the flags have them.
      linear: the linear codec whose latents are decoded; None fits one.

    Raises:
      ValueError: the loss is not finite.
      StorageError: nothing can be saved.
      Preempted: after a SIGTERM, when the state is saved.
    """
    mesh = sharding.make_mesh()
    training, held_out = corpus.split(args.val_sounds)
    val_sounds = _val_sounds(corpus, held_out, MELS[config.mode].sample_rate)
    statistics = read_statistics(corpus, training, config, linear)
    whole = sharding.replicated(mesh)
    state = jax.jit(functools.partial(init_state, config), out_shardings=whole)()
    placed, key = jax.device_put((statistics, jax.random.key(config.seed)), whole)
    with contextlib.ExitStack() as stack:
        saver = stack.enter_context(checkpoint.Saver(checkpoint.open_manager(workdir)))
        if saver.manager.latest_step() is not None:
            state = checkpoint.restore(saver.manager, state)
            logging.info("resuming after step %d", int(state.step))
        first = int(state.step) + 1
        writer = Writer(workdir, first - 1, enabled=jax.process_index() == 0)
        stack.enter_context(contextlib.closing(writer))
        told_to_stop = stack.enter_context(preemption.watch())
        steps, meter = _steps(config, mesh), _Meter(config, writer, args.log_every)
        second_stage = math.floor(config.noise_from * config.steps) + 1
        for step, sound in _batches(corpus, training, config, mesh, first):
            if step in (first, second_stage):
                logging.info("compiling the step%s", cache_note())
                meter.started = None
            state, metrics = steps[step >= second_stage](state, placed, sound, key)
            last, stop = step == config.steps, told_to_stop(step)
            saves = last or stop or step % args.checkpoint_every == 0
            meter.add(step, metrics, saves)
            if saves:
                saver.save(step, state, {}, wait=stop)
            if val_sounds and (last or (args.eval_every and step % args.eval_every == 0)):
                validate(make_codec(config, statistics, state.ema), val_sounds, writer, step)
            if saves:
                writer.flush()
            if stop and not last:
                raise preemption.Preempted(f"SIGTERM: step {step} is saved in {workdir}")
    return make_codec(config, statistics, state.ema)


def _linear_codec(folder, config: CodecConfig) -> LinearCodec | None:
    """The codec of --linear_codec.

    Raises:
      ValueError: it is none, or it does not fit the other flags.
    """
    if not folder:
        return None
    found = load_codec(folder)
    if not isinstance(found, LinearCodec) or config.encoder != "linear":
        raise ValueError(f"--linear_codec={folder} takes a linear codec, and --encoder=linear")
    for name in ("mode", "latent_dim"):
        if getattr(found, name) != getattr(config, name):
            raise ValueError(
                f"--linear_codec={folder} has {name} {getattr(found, name)}, not "
                f"{getattr(config, name)}: give --{name}={getattr(found, name)}"
            )
    return found


def main(args):
    config, out = read_config(args), Path(args.out)
    linear = _linear_codec(args.linear_codec, config)
    workdir = out / "training"
    sharding.check_batch_size(config.batch_size, sharding.make_mesh())
    settings = dataclasses.asdict(config) | {"linear_codec": linear and linear.fingerprint}
    claim(workdir, settings)
    with hold(workdir):
        corpus = open_corpus(args.sounds, MELS[config.mode].sample_rate, workdir)
        for name, reason in corpus.left_out[:3]:
            print(f"left out: {name}: {reason}", file=sys.stderr)
        hours = len(corpus.samples) / MELS[config.mode].sample_rate / 3600
        logging.info(
            "%d sounds, %.2f h; %d files left out",
            len(corpus.names),
            hours,
            len(corpus.left_out),
        )
        if (out / "codec.json").exists():
            print(f"{out} is complete: {load_codec(out).fingerprint}")
        else:
            try:
                codec = train(config, corpus, workdir, args, linear)
            except preemption.Preempted as saved:
                print(f"{saved}; run the same command again to resume", file=sys.stderr)
                return preemption.EXIT_CODE
            codec.save(out)
            print(f"{out}: codec for --codec, fingerprint {codec.fingerprint}")
    return LEFT_OUT if corpus.left_out else 0


if __name__ == "__main__":
    run(main, define_flags, memory_hint="lower --batch_size or --crop")

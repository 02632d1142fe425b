"""Generates sound for videos with public weights or a trained run.

    python -m vcm_jax.generate --model=mmaudio_large_44k_v2 --video=CLIP.mp4 --out=OUT.mp4
    python -m vcm_jax.generate --workdir=RUN --video=CLIP.mp4 --prompt="a ball" --out=OUT.mp4
    python -m vcm_jax.generate --workdir=RUN --prompt="rain" --duration=60 --steps=4 --out=RAIN.wav
    python -m vcm_jax.generate --workdir=RUN --video=FOLDER --captions=LIST.tsv --out=VIDEOS/

A clip that fails is left out with a reason and costs no other clip; the exit code is then 3, or 1
if no clip could be written. --records takes extracted features instead of videos: a test set in one
resumable run on all devices, into a folder of sounds. Sounds never clip: a limiter keeps the true
peak below -1 dBTP; in folders of sounds .as_made keeps what the network made, for evaluation.
"""

import dataclasses
import sys

import jax
from absl import flags
from tqdm import tqdm

from vcm_jax import sampling
from vcm_jax.cli import (
    LEFT_OUT,
    define_duration,
    define_run_flags,
    define_weight_flags,
    heading,
    run,
)
from vcm_jax.generation.finish import Finish
from vcm_jax.generation.outputs import VIDEO_FORMATS, generate_files, is_folder, plan
from vcm_jax.generation.records import generate_records
from vcm_jax.generation.run import Run, load
from vcm_jax.generation.windows import Windowing
from vcm_jax.records.source import RecordSource


def define_flags():
    heading("Input and output")
    define_run_flags(required=False)
    flags.DEFINE_string("model", None, "Public weights instead: their name, or a folder of files.")
    flags.DEFINE_string("video", "", "A video, or a folder of videos.")
    flags.DEFINE_string("image", "", "A picture, instead of a video.")
    flags.DEFINE_bool("ignore_picture", False, "Use the motion in the video, not what it shows.")
    flags.DEFINE_string("prompt", "", "What is to be heard.")
    flags.DEFINE_string("negative_prompt", "", "What is not to be heard, for guided samplers.")
    flags.DEFINE_string("captions", "", "TSV with columns id and caption, of videos in --video.")
    flags.DEFINE_string(
        "out",
        None,
        "OUT.mp4 (.mov, .mkv, .webm, .wav, .flac); a folder for several.",
        required=True,
    )
    flags.DEFINE_string("records", "", "Folder of extracted records, instead of --video.")
    flags.DEFINE_string("shard", "0/1", "i/n: of --records, make every n-th from the i-th on.")
    flags.DEFINE_enum(
        "format",
        None,
        ["mp4", "mov", "mkv", "webm", "wav", "flac"],
        "Of files in a folder (mp4; wav without a video).",
    )
    heading("Sampling")
    flags.DEFINE_integer(
        "steps", None, "Steps of the sampler, of equal length (1; 25 for flow matching).", 1, 1000
    )
    flags.DEFINE_list("times", [], "Decreasing times in place of --steps, such as 1,0.6,0.")
    flags.DEFINE_float(
        "guidance_scale",
        None,
        "Guidance, an input of runs with conditioned guidance; others take Euler steps (1: none).",
    )
    flags.DEFINE_list("guidance_interval", None, "Times at which that guidance applies: 0,0.8.")
    flags.DEFINE_bool("restart", False, "After every step, predict the data and add new noise.")
    heading("Length and batches")
    define_duration(0.0, "Seconds: the maximum for a video, the length for a prompt.")
    flags.DEFINE_string(
        "window",
        "auto",
        "Seconds of the windows in which longer clips are sampled; 0: each clip as a whole; auto: "
        "the training length, for clips of 1.5 times that.",
    )
    flags.DEFINE_float("window_overlap", 0.25, "Fraction of a window that the next one shares.")
    flags.DEFINE_integer("batch_size", 8, "Clips, or windows of a long one, at a time.", 1)
    flags.DEFINE_float(
        "loudness",
        None,
        "Integrated loudness of all sounds in LUFS, such as -23, before the limiter.",
        -69.0,
        0.0,
    )
    flags.DEFINE_integer("seed", 0, "Seed of the noise, any integer.")
    flags.DEFINE_list("seeds", [], "Several seeds, 0,1,2: a take of each.")
    heading("Weights")
    define_weight_flags()
    flags.DEFINE_float("sigma_rel", None, "Width of the EMA weights (the run's first).")


def read_sampler(args) -> tuple[tuple[float, ...] | None, sampling.Sampler]:
    """(times, sampler) that the flags ask for; None for as many steps as the weights need.

    Raises:
      ValueError: they are not numbers, or out of range.
    """
    try:
        given, interval = (
            text and tuple(float(number) for number in text)
            for text in (args.times, args.guidance_interval)
        )
    except ValueError as error:
        raise ValueError(f"--times and --guidance_interval take numbers: {error}") from None
    sampler = sampling.Sampler(args.guidance_scale, interval, args.restart)
    if not given and args.steps is None:
        return None, sampler
    times = sampling.check_times(given or sampling.uniform_times(args.steps))
    if times[0] != 1 or times[-1] != 0:
        raise ValueError(
            f"--times run from 1 (noise) to 0 (data), not {times[0]:g} to {times[-1]:g}"
        )
    return times, sampler


def read_seeds(args) -> tuple[int, ...]:
    """The seeds of all takes.

    Raises:
      ValueError: they are no integers, one is there twice, or --seed is given too.
    """
    try:
        seeds = tuple(int(text) for text in args.seeds) or (args.seed,)
    except ValueError:
        raise ValueError(f"--seeds={','.join(args.seeds)}: give integers, such as 0,1,2") from None
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds={','.join(args.seeds)}: one is there twice")
    if args.seeds and args.seed:
        raise ValueError("give --seed or --seeds, not both")
    return seeds


def read_windowing(args) -> Windowing:
    """How the flags divide long clips.

    Raises:
      ValueError: they are no numbers, or out of range.
    """
    try:
        seconds = None if args.window == "auto" else float(args.window)
    except ValueError:
        raise ValueError(f"--window={args.window}: give seconds, 0 or auto") from None
    return Windowing(seconds, args.window_overlap)


def read_shard(text: str) -> tuple[int, int]:
    """(i, n) of "i/n".

    Raises:
      ValueError: it is not i/n with 0 <= i < n.
    """
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ValueError(f"--shard={text}: must be i/n with 0 <= i < n")
    return int(index), int(count)


def _check_source(args) -> None:
    """Raises ValueError unless --workdir or --model is given, with flags that belong to it."""
    if bool(args.workdir) == bool(args.model):
        raise ValueError("give --model (public weights) or --workdir (a trained run)")
    for name in ("checkpoint", "sigma_rel"):
        if args.model and getattr(args, name) is not None:
            raise ValueError(f"--{name} is for --workdir: public weights have one version only")


def _load(args, sampler: sampling.Sampler, with_encoders: bool) -> Run:
    loaded = load(
        args.workdir,
        args.model,
        args.codec,
        args.encoders,
        args.dtype,
        args.checkpoint,
        args.sigma_rel,
        with_encoders,
    )
    loaded = dataclasses.replace(loaded, sampler=sampler, windowing=read_windowing(args))
    if args.negative_prompt and loaded.objective.guidance_input:
        raise ValueError(
            "--negative_prompt is for samplers that evaluate the empty condition: this run has "
            "guidance as an input instead"
        )
    if args.negative_prompt and not sampler.is_guided(loaded.objective):
        raise ValueError(
            "--negative_prompt needs guidance while sampling: give --guidance_scale (not 1)"
        )
    return loaded


def _from_records(args) -> int | None:
    others = "video image ignore_picture prompt negative_prompt captions duration encoders seeds"
    for name in others.split():
        if getattr(args, name):
            raise ValueError(f"--records has its own clips: leave out --{name}")
    if args.window != "auto":
        raise ValueError("--window is for videos and prompts: records are sampled as a whole")
    if f".{args.format}" in VIDEO_FORMATS or not is_folder(args.out):
        raise ValueError("--records makes a folder of sounds: --format=wav or flac")
    index, count = read_shard(args.shard)
    times, sampler = read_sampler(args)
    source = RecordSource(args.records)
    loaded = _load(args, sampler, with_encoders=False)
    # The processes of a distributed run share each shard.
    done = generate_records(
        loaded,
        source,
        args.out,
        times or sampling.check_times(sampling.uniform_times(loaded.steps)),
        seed=args.seed,
        batch_size=args.batch_size,
        suffix=args.format or "wav",
        part=index * jax.process_count() + jax.process_index(),
        parts=count * jax.process_count(),
        lufs=args.loudness,
    )
    if done.timed:
        speed, devices = done.timed / done.seconds, jax.local_device_count()
        print(f"{speed:.3g} clips/s after the first batch, on {devices} devices")
    return _summarise(
        done.written, done.left_out, done.limited, f"{done.kept} were there", done.kept
    )


def _from_videos(args) -> int | None:
    times, sampler = read_sampler(args)
    if args.shard != "0/1":
        raise ValueError(f"--shard={args.shard} is for --records")
    seeds = read_seeds(args)
    flags_of_plan = "video prompt captions format image ignore_picture negative_prompt".split()
    asked = {name: getattr(args, name) for name in flags_of_plan}
    wanted, left_out = plan(args.out, seeds=seeds, **asked)
    loaded, written = _load(args, sampler, with_encoders=True), 0
    finish = Finish(args.loudness, keep=is_folder(args.out))
    made = generate_files(
        loaded,
        wanted,
        times or sampling.uniform_times(loaded.steps),
        seeds=seeds,
        batch_size=min(args.batch_size, max(1, len(wanted))),
        duration=args.duration or None,
        finish=finish,
    )
    for clip, reason in tqdm(made, "Generating", len(wanted) * len(seeds), unit="clip"):
        if reason is None:
            written += 1
        else:
            left_out.append((clip, reason))
    return _summarise(written, left_out, finish.summary())


def _summarise(
    written: int, left_out: list[tuple[str, str]], limited: str, note: str = "", kept: int = 0
) -> int:
    """Prints what was done; returns the exit code."""
    if limited:
        print(limited)
    for clip, reason in left_out:
        print(f"left out: {clip}: {reason}".replace("\n", " "), file=sys.stderr)
    counts = f"{written} written, {len(left_out)} left out"
    print(f"{counts}, {note}" if note else counts)
    if not left_out:
        return 0
    return LEFT_OUT if written or kept else 1


def main(args) -> int | None:
    _check_source(args)
    return _from_records(args) if args.records else _from_videos(args)


if __name__ == "__main__":
    run(main, define_flags, memory_hint="lower --batch_size or --duration")

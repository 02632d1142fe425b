"""Generates sound for videos with a trained run.

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
from vcm_jax.cli import LEFT_OUT, define_duration, define_run_flags, heading, run
from vcm_jax.generation.finish import Finish
from vcm_jax.generation.outputs import generate_files, is_folder, plan
from vcm_jax.generation.records import generate_records
from vcm_jax.generation.run import Run, load_run
from vcm_jax.generation.windows import Windowing
from vcm_jax.records.source import RecordSource


def define_flags():
    heading("Input and output")
    define_run_flags()
    flags.DEFINE_string("video", "", "A video, or a folder of videos.")
    flags.DEFINE_string("prompt", "", "What is to be heard.")
    flags.DEFINE_string("captions", "", "TSV with columns id and caption, of videos in --video.")
    flags.DEFINE_string("out", None, "OUT.mp4 or OUT.wav; a folder for several.", required=True)
    flags.DEFINE_string("records", "", "Folder of extracted records, instead of --video.")
    flags.DEFINE_string("shard", "0/1", "i/n: of --records, make every n-th from the i-th on.")
    flags.DEFINE_enum(
        "format",
        None,
        ["mp4", "wav", "flac"],
        "Format of the files in a folder (mp4; wav for --records and prompts).",
    )
    heading("Sampling")
    flags.DEFINE_integer("steps", 1, "Steps of the sampler, of equal length.", 1, 1000)
    flags.DEFINE_list("times", [], "Decreasing times in place of --steps, such as 1,0.6,0.")
    flags.DEFINE_float(
        "guidance_scale",
        None,
        "Sample with Euler steps and this classifier-free guidance (1: none), instead of the "
        "objective's own way.",
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
    heading("Weights")
    flags.DEFINE_string("codec", None, "Codec folder (the run's own), e.g. with another vocoder.")
    flags.DEFINE_string("encoders", None, "Folder of CLIP's and Synchformer's weights.")
    flags.DEFINE_float("sigma_rel", None, "Width of the EMA weights (the run's first).")


def read_sampler(args) -> tuple[tuple[float, ...], sampling.Sampler]:
    """(times, sampler) that the flags ask for.

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
    times = sampling.check_times(given or sampling.uniform_times(args.steps))
    if times[0] != 1 or times[-1] != 0:
        raise ValueError(
            f"--times run from 1 (noise) to 0 (data), not {times[0]:g} to {times[-1]:g}"
        )
    return times, sampling.Sampler(args.guidance_scale, interval, args.restart)


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


def _load(args, sampler: sampling.Sampler, with_encoders: bool) -> Run:
    loaded = load_run(
        args.workdir, args.checkpoint, args.sigma_rel, args.codec, args.encoders, with_encoders
    )
    return dataclasses.replace(loaded, sampler=sampler, windowing=read_windowing(args))


def _from_records(args) -> int | None:
    for name in ("video", "prompt", "captions", "duration", "encoders"):
        if getattr(args, name):
            raise ValueError(f"--records has its own clips: leave out --{name}")
    if args.window != "auto":
        raise ValueError("--window is for videos and prompts: records are sampled as a whole")
    if args.format == "mp4" or not is_folder(args.out):
        raise ValueError("--records makes a folder of sounds: --format=wav or flac")
    index, count = read_shard(args.shard)
    times, sampler = read_sampler(args)
    source = RecordSource(args.records)
    # The processes of a distributed run share each shard.
    done = generate_records(
        _load(args, sampler, with_encoders=False),
        source,
        args.out,
        times,
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
    wanted, left_out = plan(
        args.out, video=args.video, prompt=args.prompt, captions=args.captions, format=args.format
    )
    loaded, written = _load(args, sampler, with_encoders=True), 0
    finish = Finish(args.loudness, keep=is_folder(args.out))
    made = generate_files(
        loaded,
        wanted,
        times,
        seed=args.seed,
        batch_size=min(args.batch_size, max(1, len(wanted))),
        duration=args.duration or None,
        finish=finish,
    )
    for clip, reason in tqdm(made, "Generating", len(wanted), unit="clip"):
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
    return _from_records(args) if args.records else _from_videos(args)


if __name__ == "__main__":
    run(main, define_flags, memory_hint="lower --batch_size or --duration")

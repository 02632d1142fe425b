"""Sound for videos, from a trained run.

    python -m vcm_jax.generate --workdir=runs/impacts --video=CLIP.mp4 --prompt="a metal ball" \\
        --steps=1 --out=OUT.mp4

A video alone, a prompt alone (`--duration`, to a .wav), a folder of videos (`--out` is a folder),
or a TSV of clips (`--captions`, columns id and caption, with `--video` the folder they are in).
`--records=RECORDS` takes extracted features instead, a whole test set in one resumable run on all
devices; `--out` is then a folder of sounds, and `--shard=0/2` half of them, for two hosts.
"""

import dataclasses
import os
import sys
from pathlib import Path

import jax
from absl import app, flags
from tqdm import tqdm

from vcm_jax import sampling
from vcm_jax.cli import show_ours
from vcm_jax.generation.clips import Request, encode_request, generate, write
from vcm_jax.generation.run import load_run
from vcm_jax.media.clips import list_clips
from vcm_jax.records.source import RecordSource


def _define_flags():
    flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
    flags.DEFINE_string("video", "", "A video, or a folder of videos.")
    flags.DEFINE_string("prompt", "", "What is to be heard.")
    flags.DEFINE_string("captions", "", "TSV with columns id and caption, of videos in --video.")
    flags.DEFINE_string("out", None, "OUT.mp4 or OUT.wav; a folder for several.", required=True)
    flags.DEFINE_string("records", "", "Folder of extracted records, instead of --video.")
    flags.DEFINE_string("shard", "0/1", "i/n: of --records, make every n-th from the i-th on.")
    flags.DEFINE_enum(
        "format", None, ["mp4", "wav", "flac"],
        "What is written into a folder (mp4; wav for --records).",
    )  # fmt: skip
    flags.DEFINE_integer("steps", 1, "Steps of the sampler, of equal length.", lower_bound=1)
    flags.DEFINE_list("times", [], "Times in place of --steps, decreasing: 1,0.6,0.")
    flags.DEFINE_float(
        "guidance_scale", None,
        "Euler steps with this classifier-free guidance (1: none), not the objective's own way.",
    )  # fmt: skip
    flags.DEFINE_list("guidance_interval", None, "Where that guidance applies: 0,0.8.")
    flags.DEFINE_bool("restart", False, "Jump to the data and noise again after every step.")
    flags.DEFINE_float("duration", 0.0, "Seconds: at most so much of a video; a prompt's length.")
    flags.DEFINE_integer("batch_size", 8, "Clips at a time, for several.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of the noise.")
    flags.DEFINE_integer("checkpoint", None, "Training step of the checkpoint (the latest).")
    flags.DEFINE_string("codec", None, "Codec folder (the run's own), e.g. with another vocoder.")
    flags.DEFINE_string("encoders", None, "Folder of CLIP's and Synchformer's weights.")
    flags.DEFINE_float("sigma_rel", None, "Width of the weights' average (the run's first).")


def read_sampler(args) -> tuple[tuple[float, ...], sampling.Sampler]:
    """(times, sampler) that the flags ask for.

    Raises:
      ValueError: when they are no times, or out of their range.
    """
    try:
        given, interval = (
            text and tuple(float(part) for part in text)
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


def _requests(args) -> tuple[list[tuple[Request, Path]], list[tuple[str, str]]]:
    """What the flags ask for: (request, output path) of every clip, and (id, reason) of failures.

    Raises:
      ValueError: when the flags contradict each other.
    """
    out, video = Path(args.out), Path(args.video) if args.video else None
    if video is None and args.captions:
        raise ValueError("--captions needs --video, the folder of its clips")
    if video is None and not args.prompt:
        raise ValueError("give --video, --prompt, or both")
    several = video is not None and (video.is_dir() or bool(args.captions))
    if several:
        if out.suffix:
            raise ValueError(f"--out={out}: several clips go into a folder")
        clips, failures = list_clips(video, Path(args.captions) if args.captions else None)
        return [
            (
                Request(c.id, c.path, c.caption or args.prompt),
                out / f"{c.id}.{args.format or 'mp4'}",
            )
            for c in clips
        ], failures
    known = (".wav", ".flac") if video is None else (".wav", ".flac", ".mp4", ".mov")
    if out.suffix.lower() not in known:
        what = "a prompt alone" if video is None else "a video"
        raise ValueError(f"--out={out}: for {what} it ends in {' or '.join(known)}")
    name = video.stem if video else args.prompt
    return [(Request(name, video, args.prompt), out)], []


def check_outputs(requests: list[tuple[Request, Path]]) -> None:
    """Raises ValueError, before any work, for a path that cannot or must not be written."""
    for request, path in requests:
        if request.video and path.exists() and path.samefile(request.video):
            raise ValueError(f"--out={path} is the video itself: give another path")
        if path.is_dir():
            raise ValueError(f"--out={path} is a folder")
        folder = path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            writable = os.access(folder, os.W_OK)
        except OSError:
            writable = False
        if not writable:
            raise ValueError(f"--out: cannot write into {folder}")


def _main_records(args):
    from vcm_jax.generation import records as generation_records  # which imports this module

    try:
        for name in ("video", "prompt", "captions", "duration", "encoders"):
            if getattr(args, name):
                raise ValueError(f"--records has its own clips: leave out --{name}")
        if args.format == "mp4" or Path(args.out).suffix:
            raise ValueError("--records makes a folder of sounds: --format=wav or flac")
        part, _, parts = args.shard.partition("/")
        if not (part.isdigit() and parts.isdigit() and int(part) < int(parts)):
            raise ValueError(f"--shard={args.shard}: must be i/n with 0 <= i < n")
        # Several processes that know of each other share each shard.
        part = int(part) * jax.process_count() + jax.process_index()
        times, sampler = read_sampler(args)
        source = RecordSource(args.records)
        run = load_run(
            args.workdir, args.checkpoint, args.sigma_rel, args.codec, with_encoders=False
        )
        run = dataclasses.replace(run, sampler=sampler)
        done = generation_records.generate_records(
            run, source, args.out, times, seed=args.seed,
            batch_size=args.batch_size, suffix=args.format or "wav",
            part=part, parts=int(parts) * jax.process_count(),
        )  # fmt: skip
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"{done.written} written, {done.kept} were there")
    if done.timed:
        speed, devices = done.timed / done.seconds, jax.local_device_count()
        print(f"{speed:.3g} clips/s after the first batch, on {devices} devices")


def _main_requests(args):
    try:
        times, sampler = read_sampler(args)
        requests, failures = _requests(args)
        check_outputs(requests)
        run = load_run(args.workdir, args.checkpoint, args.sigma_rel, args.codec, args.encoders)
        run = dataclasses.replace(run, sampler=sampler)
    except ValueError as error:
        sys.exit(f"error: {error}")
    paths = {request.id: path for request, path in requests}
    progress = tqdm(total=len(requests), desc="Generating", unit="clip")

    def encoded():
        for request, _ in requests:
            try:
                yield encode_request(request, run, args.duration or None)
            except ValueError as error:
                failures.append((request.id, str(error)))

    written = 0
    batch_size = min(args.batch_size, max(1, len(requests)))
    for item, sound in generate(run, encoded(), times, args.seed, batch_size):
        path = paths[item.request.id]
        write(item, sound, run.codec.sample_rate, path)
        progress.update()
        written += 1
    progress.close()
    for name, reason in failures:
        print(f"left out: {name}: {reason}", file=sys.stderr)
    print(f"{written} written, {len(failures)} left out")
    if not written:
        sys.exit(1)


def main(argv):
    if argv[1:]:
        raise app.UsageError(f"not understood: {' '.join(argv[1:])}")
    show_ours()
    args = flags.FLAGS
    try:
        (_main_records if args.records else _main_requests)(args)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sys.exit("error: the device has not enough memory: lower --batch_size or --duration")


if __name__ == "__main__":
    _define_flags()
    app.run(main)

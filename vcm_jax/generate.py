"""Sound for videos, from a trained run.

    python -m vcm_jax.generate --workdir=runs/impacts --video=CLIP.mp4 --prompt="a metal ball" \\
        --steps=1 --out=OUT.mp4

A video alone, a prompt alone (`--duration`, to a .wav), a folder of videos (`--out` is a folder),
or a TSV of clips (`--captions`, columns id and caption, with `--video` the folder they are in).
`--records=RECORDS` takes extracted features instead, a whole test set in one resumable run on all
devices; `--out` is then a folder of sounds, and `--shard=0/2` half of them, for two hosts.
"""

import dataclasses
import functools
import os
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from tqdm import tqdm

from vcm_jax import sampling
from vcm_jax.data.records import RecordSource
from vcm_jax.data.sequence import SequenceConfig
from vcm_jax.features import media
from vcm_jax.features.extract import encode_video
from vcm_jax.features.listing import list_clips
from vcm_jax.logs import show_ours
from vcm_jax.models import Conditions, MMDiT
from vcm_jax.runs import Run, load_run

# One evaluation looks at all of a clip at once: attention grows with the square of its length.
MAX_DURATION = 120.0


@dataclasses.dataclass(frozen=True)
class Request:
    """A sound that is wanted: `id` (noise depends on it), a video or None, a prompt or ""."""

    id: str
    video: Path | None
    prompt: str = ""


@dataclasses.dataclass(frozen=True)
class Features:
    """Encoded request: clip and sync features are None without a video."""

    request: Request
    sequence: SequenceConfig
    seconds: float
    clip: np.ndarray | None
    sync: np.ndarray | None
    text: np.ndarray


def encode_request(request: Request, run: Run, duration: float | None = None) -> Features:
    """Decodes and encodes one request; the length is the video's, or `duration` if that is less.

    Raises:
      ValueError: an unreadable video (MediaError), or one that is too short or too long.
    """
    clip = sync = None
    seconds = duration or run.sequence.duration
    if request.video is not None:
        length = media.probe(request.video).duration
        seconds = min(length, duration or length)
    if seconds > MAX_DURATION:
        raise ValueError(
            f"{request.video or request.id}: {seconds:.0f} s is more than {MAX_DURATION:.0f} s; "
            "give --duration or cut it"
        )
    try:
        sequence = dataclasses.replace(run.sequence, duration=seconds)
    except ValueError as error:
        raise ValueError(f"{request.video or request.id}: {error}") from None
    if request.video is not None:
        clip, sync = encode_video(request.video, sequence, run.encoders)
    text = run.encoders.encode_text(request.prompt, sequence)
    return Features(request, sequence, seconds, clip, sync, text)


@functools.partial(jax.jit, static_argnames=("model", "objective", "sampler", "times"))
def _sample(variables, model, objective, sampler, times, conds, has_video, noise, keys):
    net = MMDiT(model)
    apply = lambda *args: net.apply(variables, *args[:-1], method=args[-1])
    null = apply(1, "null_conditions")
    fill = lambda value, empty: jnp.where(has_video[:, None, None], value, empty)
    conds = conds.replace(clip=fill(conds.clip, null.clip), sync=fill(conds.sync, null.sync))
    u = lambda x, t, s, enc: apply(x, t, s, enc, "velocity")
    null_cond = sampling.repeat_rows(apply(null, "encode_conditions"), len(noise))
    cond = apply(conds, "encode_conditions")
    x0 = sampler(objective, u, noise, times, cond, null_cond, keys)
    stats = variables["stats"]
    return x0 * stats["latent_std"][None, None] + stats["latent_mean"][None, None]


def _noise(seed: int, request_id: str, shape) -> np.ndarray:
    """Noise as a function of (seed, id): the same in any batch."""
    return np.random.default_rng([seed, zlib.crc32(request_id.encode())]).standard_normal(
        shape, np.float32
    )


def _keys(seed: int, ids: list[str]) -> jax.Array:
    """Keys of a restart sampler's later noise, as functions of (seed, id) too."""
    hashes = np.array([zlib.crc32(request_id.encode()) for request_id in ids], np.uint32)
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(hashes)


def start_latents(run: Run, items: list[Features], times, seed: int, batch_size: int, put=None):
    """Latents of one batch of items of one length, `batch_size N C`, as the device's promise.

    The batch is filled up with copies, so that one program serves all. `put` places its arrays.
    """
    model = run.model.with_lengths(items[0].sequence)
    shape = (model.latent_seq_len, model.latent_dim)
    filled = items + items[-1:] * (batch_size - len(items))
    conds = Conditions(
        clip=_stack([f.clip for f in filled], (model.clip_seq_len, model.clip_dim)),
        sync=_stack([f.sync for f in filled], (model.sync_seq_len, model.sync_dim)),
        text=np.stack([f.text for f in filled]).astype(np.float32),
    )
    has_video = np.array([f.clip is not None for f in filled])
    noise = np.stack([_noise(seed, f.request.id, shape) for f in filled])
    keys = _keys(seed, [f.request.id for f in filled])
    if put is not None:
        conds, has_video, noise, keys = put((conds, has_video, noise, keys))
    static = (model, run.objective, run.sampler, sampling.check_times(times))
    return _sample(run.variables, *static, conds, has_video, noise, keys)


def generate_latents(run: Run, items: list[Features], times, seed: int, batch_size: int):
    """Latents of items of one length, `N C` each, in order; `times` as `sampling.sample`'s."""
    latents = []
    for start in range(0, len(items), batch_size):
        batch = items[start : start + batch_size]
        found = start_latents(run, batch, times, seed, batch_size)
        latents += list(np.asarray(found)[: len(batch)])
    return latents


def _stack(features, shape):
    """Stacks features; those that are None become zeros, which `_sample` does not look at."""
    zeros = np.zeros(shape, np.float32)
    return np.stack([zeros if f is None else f for f in features]).astype(np.float32)


def generate(
    run: Run, items: Iterable[Features], times, seed: int = 0, batch_size: int = 1
) -> Iterator[tuple[Features, np.ndarray]]:
    """(item, sound) of every item, float32 mono, as long as the item says.

    Args:
      run: from `runs.load_run`.
      items: from `encode_request`; held back until a batch of equal length is full.
      times: as `sampling.sample`'s, e.g. `sampling.uniform_times(1)`.
      seed: of the noise, which also depends on the request's id.
      batch_size: clips at a time.
    """
    waiting: dict[SequenceConfig, list[Features]] = {}

    def finish(group):
        for item, latent in zip(group, generate_latents(run, group, times, seed, batch_size)):
            yield item, run.codec.decode(latent)[: round(item.seconds * run.codec.sample_rate)]

    for item in items:
        lengths = (
            item.sequence.latent_seq_len,
            item.sequence.clip_seq_len,
            item.sequence.sync_seq_len,
        )
        group = waiting.setdefault(lengths, [])
        group.append(item)
        if len(group) == batch_size:
            yield from finish(waiting.pop(lengths))
    for group in waiting.values():
        yield from finish(group)


def write(item: Features, sound: np.ndarray, sample_rate: int, path: Path) -> None:
    """Writes the sound as .wav or .flac, or the request's own picture with it as .mp4 or .mov."""
    if path.suffix.lower() in (".wav", ".flac"):
        media.write_sound(path, sound, sample_rate)
    else:
        media.mux_audio(item.request.video, sound, sample_rate, path, item.seconds)


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
    from vcm_jax import generate_records  # which imports this module

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
        done = generate_records.generate_records(
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

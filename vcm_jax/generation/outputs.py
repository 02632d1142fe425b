"""Where generated sounds go, and writing them clip by clip: a clip that fails costs no other."""

import collections
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from absl import logging

from vcm_jax.atomic import UNWRITABLE
from vcm_jax.cli import describe, explain
from vcm_jax.generation import clips
from vcm_jax.generation.clips import Features, Request, encode_request, sample_items, write
from vcm_jax.generation.finish import Finish
from vcm_jax.generation.run import Run
from vcm_jax.media.clips import list_clips
from vcm_jax.media.names import output_name

SOUND_FORMATS, VIDEO_FORMATS = (".wav", ".flac"), (".mp4", ".mov", ".mkv", ".webm")
_STAGE_SECONDS = 512.0  # of sound for which features are made before the encoders are freed

Wanted = list[tuple[Request, Path]]  # what is to be generated, and the file it goes to
Failures = list[tuple[str, str]]  # (id, reason) of clips that are left out


def is_folder(out: str) -> bool:
    """Whether --out names a folder: it is one, ends in a separator, or has no media suffix."""
    suffix = Path(out).suffix.lower()
    return Path(out).is_dir() or out.endswith(os.sep) or suffix not in SOUND_FORMATS + VIDEO_FORMATS


def plan(
    out: str,
    *,
    video: str = "",
    prompt: str = "",
    captions: str = "",
    format: str | None = None,
    image: str = "",
    ignore_picture: bool = False,
    negative_prompt: str = "",
    seeds: Sequence[int] = (0,),
) -> tuple[Wanted, Failures]:
    """What the flags of `vcm_jax.generate` ask for: requests with output paths, and failures.

    Raises:
      ValueError: flags that contradict each other, or an output that must not be written.
    """
    source = Path(video) if video else None
    if not out:
        raise ValueError("--out is empty: give a file or a folder")
    if source is None and captions:
        raise ValueError("--captions needs --video, the folder of its clips")
    if source is None and ignore_picture:
        raise ValueError("--ignore_picture needs --video, whose motion counts then")
    if source is not None and image:
        raise ValueError("give --image or --video, not both")
    if source is None and not prompt and not image:
        raise ValueError("give --video, --prompt, or both; or --image")
    if source is not None and (source.is_dir() or captions):
        wanted, failures = _plan_folder(Path(out), source, prompt, captions, format or "mp4")
    else:
        wanted, failures = [_plan_file(out, source, prompt, format, image)], []
    changes = {"ignore_picture": ignore_picture, "negative_prompt": negative_prompt}
    wanted = [(dataclasses.replace(request, **changes), path) for request, path in wanted]
    _check_outputs(wanted, seeds)
    return wanted, failures


def _plan_folder(
    out: Path, videos: Path, prompt: str, captions: str, suffix: str
) -> tuple[Wanted, Failures]:
    if not is_folder(str(out)) or out.is_file():
        raise ValueError(f"--out={out}: several clips go into a folder")
    listed, failures = list_clips(videos, Path(captions) if captions else None)
    wanted, taken = [], {}
    for clip in listed:
        try:
            path = out / f"{output_name(clip.id)}.{suffix}"
        except ValueError as error:
            failures.append((clip.id, str(error)))
            continue
        if clip.start:
            reason = f"it starts at {clip.start:g} s; a video gets sound as a whole: cut it first"
            failures.append((clip.id, reason))
        elif other := taken.get(path):
            failures.append((clip.id, f"its output {path} is that of {other}"))
        elif path.is_dir():
            failures.append((clip.id, f"its output {path} is a folder"))
        else:
            taken[path] = clip.id
            wanted.append((Request(clip.id, clip.path, clip.caption or prompt), path))
    return wanted, failures


def _plan_file(
    out: str, video: Path | None, prompt: str, format: str | None, image: str
) -> tuple[Request, Path]:
    if video is not None and not video.exists():
        raise ValueError(f"--video={video}: no such file or folder")
    if image and not Path(image).is_file():
        raise ValueError(f"--image={image}: no such file")
    name = video.stem if video else prompt or Path(image).stem
    known = SOUND_FORMATS + VIDEO_FORMATS if video or image else SOUND_FORMATS
    path = Path(out)
    if path.is_dir() or out.endswith(os.sep):
        # A prompt may contain slashes; they must not make folders.
        suffix = format or ("mp4" if video or image else "wav")
        path /= f"{output_name(name.replace('/', ' '))}.{suffix}"
    elif format and path.suffix.lower() != f".{format}":
        raise ValueError(f"--out={out} does not end in .{format}, as --format has it")
    if path.suffix.lower() not in known:
        what = "a prompt alone" if known == SOUND_FORMATS else "a video or a picture"
        raise ValueError(f"--out={out}: for {what} it ends in {' or '.join(known)}, or in /")
    return Request(name, video, prompt, Path(image) if image else None), path


def _check_outputs(wanted: Wanted, seeds: Sequence[int]) -> None:
    """Raises ValueError, before any work, for a path that cannot or must not be written."""
    videos = {}
    for request, _ in wanted:
        if request.video is not None:
            videos[_identity(request.video)] = request.video
    outputs = [take_path(path, seed, seeds) for _, path in wanted for seed in seeds]
    if twice := [path for path, count in collections.Counter(outputs).items() if count > 1]:
        raise ValueError(f"--out: two clips, or seeds, have the output {twice[0]}")
    for path in outputs:
        if path.is_dir():
            raise ValueError(f"--out={path} is a folder")
        if path.exists() and _identity(path) in videos:
            raise ValueError(f"--out: {path} is one of the videos themselves: give another path")
    for folder in {path.parent for _, path in wanted}:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            writable = os.access(folder, os.W_OK)
        except OSError:
            writable = False
        if not writable:
            raise ValueError(f"--out: cannot write into {folder}")


def _identity(path: Path):
    """What is the same for all names of a file."""
    try:
        found = path.stat()
    except OSError:
        return path.absolute()
    return found.st_dev, found.st_ino


def generate_files(
    run: Run,
    wanted: Wanted,
    times,
    *,
    seeds: Sequence[int] = (0,),
    batch_size: int = 1,
    duration: float | None = None,
    finish: Finish | None = None,
) -> Iterator[tuple[str, str | None]]:
    """Generates and writes every clip; yields (id, None), or (id, reason) if it is left out.

    Where encoders, network and codec are loaded in stages, many clips go through each stage before
    the next one: their features and latents are small.

    Args:
      run: from `load_run` or `load_public`.
      wanted: from `plan`.
      times: as `sampling.sample`'s.
      seeds: of the noise, any integers; of several each gives a sound, see `take_path`.
      batch_size: clips at a time.
      duration: seconds, at most, of each.
      finish: the loudness that is wanted, and a count of what the limiter did.

    Raises:
      OSError: the disk is full or read-only, so that no later clip can be written either.
    """
    work = _Work(run, dict(wanted), times, seeds, batch_size, duration, finish)
    waiting = collections.deque(request for request, _ in wanted)
    while waiting:
        items = work.through("encoders", work.encoded, waiting)
        if items:
            yield from work.written(work.through("variables", work.sampled, items))
        yield from work.drain()


@dataclasses.dataclass
class _Work:
    """The stages of `generate_files`, whose arguments these are; failures wait to be told."""

    run: Run
    paths: dict[Request, Path]
    times: Sequence[float]
    seeds: Sequence[int]
    batch_size: int
    duration: float | None
    finish: Finish | None
    failures: Failures = dataclasses.field(default_factory=list)

    def through(self, stage: str, work: Callable, argument):
        """What `work(run, argument)` yields, for a run in which the stage is loaded.

        If it is freed afterwards, that is a list. Otherwise each clip goes on as soon as it can.
        """
        with self.run.stage(stage) as run:
            found = work(run, argument)
            return list(found) if self.run.loaders else found

    def encoded(self, run: Run, waiting: collections.deque) -> Iterator[Features]:
        """Features of the requests that wait; in stages, of as many as are to be held at once."""
        seconds = 0.0
        while waiting and (seconds < _STAGE_SECONDS or not run.loaders):
            request = waiting.popleft()
            try:
                item = encode_request(request, run, self.duration)
            except Exception as error:
                self.failures.append((request.id, reason(error)))
                continue
            seconds += item.seconds
            yield item

    def sampled(self, run: Run, items: Iterable[Features]):
        """(seed, item, latents) of every item and seed."""
        items = items if len(self.seeds) == 1 else list(items)
        for seed in self.seeds:
            arguments = items, self.times, seed, self.batch_size, self._leave_out
            for item, latent in sample_items(run, *arguments):
                yield seed, item, latent

    def written(self, found) -> Iterator[tuple[str, str | None]]:
        """Decodes and writes what `sampled` gives."""
        with self.run.stage("codec") as run:
            for seed, item, latent in found:
                yield from self.drain()
                path = take_path(self.paths[item.request], seed, self.seeds)
                try:
                    sound = clips.decode(run, item, latent, seed)
                    write(item, sound, run.codec.sample_rate, path, self.finish)
                except Exception as error:
                    if is_hopeless(error):
                        raise
                    self._leave_out(item, error)
                else:
                    yield item.request.id, None

    def drain(self) -> Iterator[tuple[str, str]]:
        """The failures that nobody has been told of."""
        while self.failures:
            yield self.failures.pop(0)

    def _leave_out(self, item: Features, error: Exception) -> None:
        self.failures.append((item.request.id, reason(error)))


def take_path(path: Path, seed: int, seeds: Sequence[int]) -> Path:
    """The file of one of several takes, NAME_SEED.SUFFIX; `path` itself if there is one only."""
    return path if len(seeds) == 1 else path.with_name(f"{path.stem}_{seed}{path.suffix}")


def is_hopeless(error: BaseException) -> bool:
    """Whether writing failed for a reason that every later clip meets too."""
    return isinstance(error, OSError) and error.errno in UNWRITABLE


def reason(error: Exception) -> str:
    """Why a clip is left out, in one line; the traceback of what looks like a bug is logged."""
    if "RESOURCE_EXHAUSTED" in str(error) or isinstance(error, MemoryError):
        return "not enough memory: lower --batch_size or --duration"
    if explain(error) is None:
        logging.error("a clip is left out", exc_info=error)
        return f"{type(error).__name__}: {describe(error)}"
    return describe(error)

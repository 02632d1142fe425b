"""Where generated sounds go, and writing them clip by clip: a clip that fails costs no other."""

import os
from collections.abc import Iterator
from pathlib import Path

from absl import logging

from vcm_jax.atomic import UNWRITABLE
from vcm_jax.cli import describe, explain
from vcm_jax.generation.clips import Features, Request, encode_request, generate, write
from vcm_jax.generation.finish import Finish
from vcm_jax.generation.run import Run
from vcm_jax.media.clips import list_clips
from vcm_jax.media.names import output_name

SOUND_FORMATS, VIDEO_FORMATS = (".wav", ".flac"), (".mp4", ".mov")

Wanted = list[tuple[Request, Path]]  # what is to be generated, and the file it goes to
Failures = list[tuple[str, str]]  # (id, reason) of clips that are left out


def is_folder(out: str) -> bool:
    """Whether --out names a folder: it is one, ends in a separator, or has no media suffix."""
    suffix = Path(out).suffix.lower()
    return Path(out).is_dir() or out.endswith(os.sep) or suffix not in SOUND_FORMATS + VIDEO_FORMATS


def plan(
    out: str, *, video: str = "", prompt: str = "", captions: str = "", format: str | None = None
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
    if source is None and not prompt:
        raise ValueError("give --video, --prompt, or both")
    if source is not None and (source.is_dir() or captions):
        wanted, failures = _plan_folder(Path(out), source, prompt, captions, format or "mp4")
    else:
        wanted, failures = [_plan_file(out, source, prompt, format)], []
    _check_outputs(wanted)
    return wanted, failures


def _plan_folder(
    out: Path, videos: Path, prompt: str, captions: str, suffix: str
) -> tuple[Wanted, Failures]:
    if not is_folder(str(out)) or out.is_file():
        raise ValueError(f"--out={out}: several clips go into a folder")
    clips, failures = list_clips(videos, Path(captions) if captions else None)
    wanted, taken = [], {}
    for clip in clips:
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
    out: str, video: Path | None, prompt: str, format: str | None
) -> tuple[Request, Path]:
    if video is not None and not video.exists():
        raise ValueError(f"--video={video}: no such file or folder")
    name = video.stem if video else prompt
    known = SOUND_FORMATS if video is None else SOUND_FORMATS + VIDEO_FORMATS
    path = Path(out)
    if path.is_dir() or out.endswith(os.sep):
        # A prompt may contain slashes; they must not make folders.
        suffix = format or ("mp4" if video else "wav")
        path /= f"{output_name(name.replace('/', ' '))}.{suffix}"
    elif format and path.suffix.lower() != f".{format}":
        raise ValueError(f"--out={out} does not end in .{format}, as --format has it")
    if path.suffix.lower() not in known:
        what = "a prompt alone" if video is None else "a video"
        raise ValueError(f"--out={out}: for {what} it ends in {' or '.join(known)}, or in /")
    return Request(name, video, prompt), path


def _check_outputs(wanted: Wanted) -> None:
    """Raises ValueError, before any work, for a path that cannot or must not be written."""
    videos = {}
    for request, _ in wanted:
        if request.video is not None:
            videos[_identity(request.video)] = request.video
    for _, path in wanted:
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
    seed: int = 0,
    batch_size: int = 1,
    duration: float | None = None,
    finish: Finish | None = None,
) -> Iterator[tuple[str, str | None]]:
    """Generates and writes every clip; yields (id, None), or (id, reason) if it is left out.

    Args:
      run: from `load_run`.
      wanted: from `plan`.
      times: as `sampling.sample`'s.
      seed: of the noise, any integer.
      batch_size: clips at a time.
      duration: seconds, at most, of each.
      finish: the loudness that is wanted, and a count of what the limiter did.

    Raises:
      OSError: the disk is full or read-only, so that no later clip can be written either.
    """
    paths = {request.id: path for request, path in wanted}
    failures: Failures = []

    def encoded() -> Iterator[Features]:
        for request, _ in wanted:
            try:
                yield encode_request(request, run, duration)
            except Exception as error:
                failures.append((request.id, reason(error)))

    def leave_out(item: Features, error: Exception) -> None:
        failures.append((item.request.id, reason(error)))

    for item, sound in generate(run, encoded(), times, seed, batch_size, leave_out):
        yield from _drain(failures)
        try:
            write(item, sound, run.codec.sample_rate, paths[item.request.id], finish)
        except Exception as error:
            if is_hopeless(error):
                raise
            leave_out(item, error)
        else:
            yield item.request.id, None
    yield from _drain(failures)


def _drain(failures: Failures) -> Iterator[tuple[str, str]]:
    while failures:
        yield failures.pop(0)


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

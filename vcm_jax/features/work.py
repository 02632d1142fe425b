"""What extraction does with each clip, in this process and in worker processes."""

import collections
import concurrent.futures
import dataclasses
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures.process import BrokenProcessPool

import jax
import numpy as np
from threadpoolctl import threadpool_limits

from vcm_jax.codec import load_codec
from vcm_jax.features.encoders import Encoders
from vcm_jax.media.clips import Clip, printable
from vcm_jax.media.read import MediaError, is_silent, read_audio, read_frames
from vcm_jax.records.schema import RecordError, latent_sums, serialize
from vcm_jax.records.sequence import SequenceConfig

_DEATHS = 10  # clips in a row whose workers died: then the clips are not to blame
_SHORTEST_REMAINDER = 0.1  # s that the last segment of a long sound may lack


class ExtractError(ValueError):
    """An extraction that cannot run at all; the message is one line."""


def read_sound(path, sequence: SequenceConfig, shortest: float, start: float = 0.0) -> np.ndarray:
    """Read a clip's sound.

    Args:
      path: sound or video file.
      sequence: lengths of the clip.
      shortest: seconds of sound that the file must have.
      start: seconds from the beginning of the file to the beginning of the clip.

    Returns:
      (sequence.num_samples,) float32, cut or zero-padded.

    Raises:
      MediaError: unreadable, no sound, shorter than `shortest`, or digital silence.
    """
    audio = read_audio(path, sequence.sample_rate, sequence.num_samples, shortest, start=start)
    if is_silent(audio):
        raise MediaError(f"{path}: digital silence")
    return audio


def read_segments(path, sequence: SequenceConfig, start: float = 0.0) -> Iterator[np.ndarray]:
    """Split a sound into consecutive segments of `sequence.duration` seconds from `start` on.

    The remainder at the end is dropped unless it lacks at most 0.1 s. A sound shorter than one
    segment gives one, zero-padded.

    Yields:
      (sequence.num_samples,) float32 each.

    Raises:
      MediaError: unreadable, or no sound.
    """
    audio = read_audio(path, sequence.sample_rate, start=start)
    step = sequence.duration * sequence.sample_rate
    tolerance = _SHORTEST_REMAINDER * sequence.sample_rate
    for i in range(max(1, int((len(audio) + tolerance) // step))):
        segment = audio[round(i * step) :][: sequence.num_samples]
        yield np.pad(segment, (0, sequence.num_samples - len(segment)))


@dataclasses.dataclass(frozen=True)
class Job:
    """The settings that all clips share.

    Attributes:
      sequence: lengths.
      transforms: of frames (`Encoders.frame_transforms`); None for sounds without pictures.
      segments: whether a sound is split into segments.
      text_rows: {caption: its row in the text table}.
      encoders, codec: None in a worker process that leaves their work to the main process.
    """

    sequence: SequenceConfig
    transforms: Mapping[float, Callable] | None
    segments: bool
    text_rows: Mapping[str, int]
    encoders: Encoders | None
    codec: object | None

    def _read(self, clip: Clip) -> Iterator[dict]:
        common = {"caption": clip.caption, "text_row": self.text_rows[clip.caption]}
        if self.segments:
            length = round(self.sequence.duration * self.sequence.sample_rate)
            for i, audio in enumerate(read_segments(clip.path, self.sequence, clip.start)):
                entry = {"id": f"{clip.id}_{i}"}
                if is_silent(audio[:length]):
                    yield entry | {"failure": f"{clip.path}: digital silence in this segment"}
                else:
                    yield entry | common | {"sound": audio}
            return
        shortest = self.sequence.duration if self.transforms else 0.0
        entry = {"id": clip.id} | common
        entry["sound"] = read_sound(clip.path, self.sequence, shortest, clip.start)
        if self.transforms:
            duration = self.sequence.duration
            entry["frames"] = read_frames(clip.path, self.transforms, duration, start=clip.start)
        yield entry

    def _encode(self, clip: Clip, entry: dict) -> dict:
        """Replace frames and sound in an entry by features and latents, if this process can."""
        try:
            if self.encoders and "frames" in entry:
                frames = entry.pop("frames")
                entry["clip"], entry["sync"] = self.encoders.encode_frames(frames, self.sequence)
            if self.codec and "sound" in entry:
                mean, std = self.codec.encode(entry.pop("sound"))
                entry |= {"latent_mean": mean, "latent_std": std}
        except Exception as error:
            if self._is_device_full(error):
                raise
            return {"id": entry["id"], "failure": failure_reason(clip, error)}
        return entry

    def _is_device_full(self, error: Exception) -> bool:
        """Whether a batch does not fit the device: then no clip can be encoded."""
        encoding = self.encoders is not None and self.encoders.on_device
        return "RESOURCE_EXHAUSTED" in str(error) or (encoding and isinstance(error, MemoryError))

    def read(self, clip: Clip) -> list[dict]:
        """Read a clip and encode what this process can encode.

        Returns:
          One entry for each record (several with `segments`). An entry with a `failure`, the
          reason, stands for something that cannot be used.
        """
        try:
            return [self._encode(clip, entry) for entry in self._read(clip)]
        except Exception as error:
            if self._is_device_full(error):
                raise
            return [{"id": clip.id, "failure": failure_reason(clip, error)}]

    def finish(self, clip: Clip, entries: list[dict]) -> Iterator[tuple]:
        """Turn the entries of `read` into records.

        Yields:
          (id, serialized record, latent sums), or (id, None, reason) for what cannot be used.
        """
        for entry in entries:
            entry = self._encode(clip, entry)
            if "failure" in entry:
                yield entry["id"], None, entry["failure"]
                continue
            try:
                sums = latent_sums(entry["latent_mean"], entry["latent_std"])
                yield entry["id"], serialize(entry), sums
            except Exception as error:
                yield entry["id"], None, failure_reason(clip, error)


def failure_reason(clip: Clip, error: Exception) -> str:
    """One line that says why a clip was left out: it names the file, and errors of other types."""
    if isinstance(error, (MediaError, RecordError)):
        return printable(str(error))
    return printable(f"{clip.path}: {type(error).__name__}: {error}")


_worker_job = None


def _exit_with(parent) -> None:
    parent.join()
    os._exit(1)


def _start_worker(job: Job, codec_folder):
    global _worker_job
    # One thread in each process: further threads compete for the same cores, and an accelerator
    # has no room for several processes.
    threadpool_limits(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for libraries that are not loaded yet, such as torch
    jax.config.update("jax_platforms", "cpu")
    codec = load_codec(codec_folder) if codec_folder else None
    _worker_job = dataclasses.replace(job, codec=codec)
    # A worker that waits for work does not notice that its parent was killed.
    parent = multiprocessing.parent_process()
    threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()


def _work(clip: Clip) -> list[dict]:
    return _worker_job.read(clip)


def _run_pool(
    job: Job, codec_folder, clips: list[Clip], workers: int, ahead: int
) -> Iterator[list[tuple]]:
    """`run` in one pool of workers, to which up to `ahead` clips are submitted at a time.

    Raises:
      BrokenProcessPool: a worker died.
    """
    for_worker = dataclasses.replace(
        job, encoders=None if job.encoders.on_device else job.encoders, codec=None
    )
    init = (for_worker, None if job.codec.on_device else codec_folder)
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, spawn, _start_worker, init) as pool:
        waiting = collections.deque()
        for clip in clips:
            waiting.append((clip, pool.submit(_work, clip)))
            if len(waiting) >= ahead:
                clip, found = waiting.popleft()
                yield list(job.finish(clip, found.result()))
        for clip, found in waiting:
            yield list(job.finish(clip, found.result()))


def run(job: Job, codec_folder, clips: list[Clip], workers: int) -> Iterator[list[tuple]]:
    """Process clips with `workers` processes.

    Encoders and a codec that use an accelerator or all cores run in this process alone. If a
    worker dies, the clips that it may have been reading are read again one at a time, and one at
    which a worker dies again is left out.

    Yields:
      The results of `Job.finish` for each clip, in order.

    Raises:
      ExtractError: workers die whatever they read.
    """
    if workers <= 1:
        yield from (list(job.finish(clip, job.read(clip))) for clip in clips)
        return
    # Few clips are submitted at a time, because results that wait take memory: 60 MB for the
    # frames of a clip.
    ahead = workers * (2 if job.transforms and job.encoders.on_device else 8)
    done = suspects = deaths = 0  # the clips from `done` to `suspects` are read one at a time
    while done < len(clips):
        alone = done < suspects
        group = clips[done:suspects] if alone else clips[done:]
        pool = (1, 1) if alone else (workers, ahead)
        try:
            for results in _run_pool(job, codec_folder, group, *pool):
                done, deaths = done + 1, 0
                yield results
        except BrokenProcessPool:
            if not alone:
                suspects = done + ahead
                continue
            deaths += 1
            if deaths == _DEATHS:
                raise ExtractError(
                    f"{_DEATHS} worker processes in a row died (killed, or out of memory)"
                ) from None
            clip, done = clips[done], done + 1
            yield [(clip.id, None, f"{printable(str(clip.path))}: its worker process died")]

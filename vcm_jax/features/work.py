"""What is done to each clip on its way to records, in this process and in workers."""

import concurrent.futures
import dataclasses
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from threadpoolctl import threadpool_limits

from vcm_jax.codec import load_codec
from vcm_jax.features.encoders import Encoders
from vcm_jax.media.clips import Clip
from vcm_jax.media.read import MediaError, is_silent, read_audio, read_frames
from vcm_jax.records.schema import RecordError, latent_sums, serialize
from vcm_jax.records.sequence import SequenceConfig

# What a bad file may raise: it must not end a run of days.
_EXPECTED = (ValueError, ArithmeticError, OSError)


class WorkerError(ValueError):
    """A worker process is gone; one line."""


def read_sound(path, sequence: SequenceConfig, shortest: float, start: float = 0.0) -> np.ndarray:
    """A clip's sound from `start` (seconds) on, (sequence.num_samples,) float32, cut or
    zero-padded.

    Raises:
      MediaError: unreadable, no sound, shorter than `shortest` seconds, or digital silence.
    """
    audio = read_audio(path, sequence.sample_rate, sequence.num_samples, shortest, start)
    if is_silent(audio):
        raise MediaError(f"{path}: digital silence")
    return audio


def read_pieces(path, sequence: SequenceConfig, start: float = 0.0) -> Iterator[np.ndarray]:
    """All pieces of `sequence.duration` of a sound from `start` on, each as `read_sound`'s.

    What is left at the end is no piece (0.1 s may be missing), but a shorter sound is one, padded.

    Raises:
      MediaError: unreadable, or no sound.
    """
    audio = read_audio(path, sequence.sample_rate, start=start)
    step, tolerance = sequence.duration * sequence.sample_rate, 0.1 * sequence.sample_rate
    for i in range(max(1, int((len(audio) + tolerance) // step))):
        piece = audio[round(i * step) :][: sequence.num_samples]
        yield np.pad(piece, (0, sequence.num_samples - len(piece)))


@dataclasses.dataclass(frozen=True)
class Job:
    """What is the same for all clips.

    Attributes:
      sequence: lengths.
      transforms: of frames (`Encoders.frame_transforms`), None for sounds without pictures.
      pieces: whether a sound gives all of its pieces.
      text_rows: of each caption in the text table.
      encoders, codec: None in a process that leaves their work to another one.
    """

    sequence: SequenceConfig
    transforms: Mapping[float, Callable] | None
    pieces: bool
    text_rows: Mapping[str, int]
    encoders: Encoders | None
    codec: object | None

    def _read(self, clip: Clip) -> Iterator[dict]:
        common = {"caption": clip.caption, "text_row": self.text_rows[clip.caption]}
        if self.transforms is None and self.pieces:
            for i, audio in enumerate(read_pieces(clip.path, self.sequence, clip.start)):
                entry = {"id": f"{clip.id}_{i}"}
                if is_silent(audio[: round(self.sequence.duration * self.sequence.sample_rate)]):
                    yield entry | {"failure": f"{clip.path}: digital silence in this piece"}
                else:
                    yield entry | common | {"sound": audio}
            return
        shortest = self.sequence.duration if self.transforms else 0.0
        entry = {"id": clip.id} | common
        entry["sound"] = read_sound(clip.path, self.sequence, shortest, clip.start)
        if self.transforms:
            duration = self.sequence.duration
            entry["frames"] = read_frames(clip.path, self.transforms, duration, clip.start)
        yield entry

    def _encode(self, clip: Clip, entry: dict) -> dict:
        """The entry with features and latents in place of what this process can encode."""
        try:
            if self.encoders and "frames" in entry:
                frames = entry.pop("frames")
                entry["clip"], entry["sync"] = self.encoders.encode_frames(frames, self.sequence)
            if self.codec and "sound" in entry:
                mean, std = self.codec.encode(entry.pop("sound"))
                entry |= {"latent_mean": mean, "latent_std": std}
        except _EXPECTED as error:
            return {"id": entry["id"], "failure": _reason(clip, error)}
        return entry

    def read(self, clip: Clip) -> list[dict]:
        """The clip's records (several with `pieces`) as far as this process makes them.

        An entry with `failure`, the reason, stands for what cannot be used.
        """
        try:
            return [self._encode(clip, entry) for entry in self._read(clip)]
        except _EXPECTED as error:
            return [{"id": clip.id, "failure": _reason(clip, error)}]

    def finish(self, clip: Clip, entries: list[dict]) -> Iterator[tuple]:
        """(id, serialized record, its latents' sums) or (id, None, reason) of what `read` gave."""
        for entry in entries:
            entry = self._encode(clip, entry)
            if "failure" in entry:
                yield entry["id"], None, entry["failure"]
                continue
            try:
                sums = latent_sums(entry["latent_mean"], entry["latent_std"])
                yield entry["id"], serialize(entry), sums
            except _EXPECTED as error:
                yield entry["id"], None, _reason(clip, error)


def _reason(clip: Clip, error: Exception) -> str:
    if isinstance(error, (MediaError, RecordError)):
        return str(error)
    return f"{clip.path}: {type(error).__name__}: {error}"


_worker_job = None


def _start_worker(job: Job, codec_folder):
    global _worker_job
    # One process per core: further threads only get into each other's way, and an accelerator
    # has no room for several processes.
    threadpool_limits(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of what is not loaded yet: torch
    jax.config.update("jax_platforms", "cpu")
    codec = load_codec(codec_folder) if codec_folder else None
    _worker_job = dataclasses.replace(job, codec=codec)
    parent = multiprocessing.parent_process()
    # A worker that waits for work does not notice that its parent was killed.
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _work(clip: Clip) -> list[dict]:
    return _worker_job.read(clip)


def run(job: Job, codec_folder, clips: list[Clip], workers: int) -> Iterator[list[tuple]]:
    """Job.finish of every clip, in order, with `workers` processes.

    Encoders and a codec that want an accelerator, or all cores, work in this process alone.

    Raises:
      WorkerError: one of them died.
    """
    if workers <= 1:
        yield from (list(job.finish(clip, job.read(clip))) for clip in clips)
        return
    for_worker = dataclasses.replace(
        job, encoders=None if job.encoders.on_device else job.encoders, codec=None
    )
    init = (for_worker, None if job.codec.on_device else codec_folder)
    # Submitted a few at a time: what waits takes memory, the frames of a clip 60 MB.
    ahead = workers * (2 if job.transforms and job.encoders.on_device else 8)
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, spawn, _start_worker, init) as pool:
        waiting = []
        try:
            for clip in clips:
                waiting.append((clip, pool.submit(_work, clip)))
                if len(waiting) >= ahead:
                    clip, found = waiting.pop(0)
                    yield list(job.finish(clip, found.result()))
            while waiting:
                clip, found = waiting.pop(0)
                yield list(job.finish(clip, found.result()))
        except concurrent.futures.process.BrokenProcessPool:
            raise WorkerError("a worker process died (killed, or out of memory)") from None

"""The extraction command: videos or sounds and their captions to records.

    python -m vcm_jax.features.extract --videos=DIR --captions=TSV --out=RECORDS
    python -m vcm_jax.features.extract --sounds=DIR --captions=TSV --out=RECORDS --codec=DIR

The TSV has a header with the columns `id` (a file's stem, or its path inside DIR) and `caption`.
Without --captions every file of the folder is taken, with an empty caption; without --codec the
linear codec is fitted on these sounds. Clips that cannot be used are listed in
RECORDS/failures.tsv. A run that was stopped goes on where it was when it is started again, and
--shard=0/4 ... --shard=3/4 share the work between processes.
"""

import concurrent.futures
import dataclasses
import hashlib
import inspect
import json
import multiprocessing
import os
import secrets
import shutil
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from absl import app, flags
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from vcm_jax.atomic import atomic_path
from vcm_jax.codec import check_codec, copy_codec, fit_linear_codec, load_codec
from vcm_jax.data import records
from vcm_jax.data.sequence import SequenceConfig
from vcm_jax.features.encoders import Encoders, WeightsFreeEncoders, encoders_from_spec
from vcm_jax.features.listing import SOUND_SUFFIXES, VIDEO_SUFFIXES, Clip, list_clips
from vcm_jax.features.media import MediaError, is_silent, read_audio, read_frames
from vcm_jax.logs import show_ours

_CHUNK = 256  # clips per part file: what a stopped run repeats at most
_FIT_CLIPS = 400  # sounds that the linear codec is fitted on
_SETTINGS = "settings.json"  # in RECORDS: what the parts there were made with


class ExtractError(ValueError):
    """An extraction that cannot run at all; one line."""


def encode_video(
    path, sequence: SequenceConfig, encoders: Encoders
) -> tuple[np.ndarray, np.ndarray]:
    """Decode and encode a video: clip (Tc, clip_dim) and sync (Ts, sync_dim) features, float32.

    Raises:
      MediaError: unreadable, no picture, or shorter than `sequence.duration`.
    """
    frames = read_frames(path, encoders.frame_transforms(sequence), sequence.duration)
    return encoders.encode_frames(frames, sequence)


def read_sound(path, sequence: SequenceConfig, shortest: float, start: float = 0.0) -> np.ndarray:
    """A clip's sound from `start` (seconds) on, (sequence.num_samples,) float32, cut or
    zero-padded.

    Raises:
      MediaError: unreadable, no sound, shorter than `shortest` seconds, or digital silence.
    """
    skipped = round(start * sequence.sample_rate)
    num_samples = skipped + sequence.num_samples
    audio = read_audio(path, sequence.sample_rate, num_samples, shortest)[skipped:]
    if is_silent(audio):
        raise MediaError(f"{path}: digital silence")
    return audio


@dataclasses.dataclass(frozen=True)
class _Job:
    """What is the same for all clips; `video` says whether they have a picture."""

    sequence: SequenceConfig
    encoders: Encoders
    codec: object
    video: bool
    text_rows: Mapping[str, int]  # of each caption in the text table

    def read(self, clip: Clip) -> tuple[dict, np.ndarray]:
        """The clip's record without its latents, and its sound."""
        shortest = self.sequence.duration if self.video else 0.0
        audio = read_sound(clip.path, self.sequence, shortest, clip.start)
        record = {"id": clip.id, "caption": clip.caption}
        if self.video:
            record["clip"], record["sync"] = encode_video(clip.path, self.sequence, self.encoders)
        record["text_row"] = self.text_rows[clip.caption]
        return record, audio

    def encode(self, record: dict, audio: np.ndarray) -> tuple[bytes, np.ndarray]:
        """The whole record, serialized, and its latents' sums."""
        mean, std = self.codec.encode(audio)
        record |= {"latent_mean": mean, "latent_std": std}
        return records.serialize(record), records.latent_sums(mean, std)

    def attempt(self, clip: Clip, function, *args):
        """function(*args), or (None, reason): one bad file must not end a run of days."""
        try:
            return function(*args)
        except (MediaError, records.RecordError) as error:
            return None, str(error)
        except (ValueError, ArithmeticError, OSError) as error:
            return None, f"{clip.path}: {type(error).__name__}: {error}"

    def extract(self, clip: Clip):
        """The record and the sums of `encode`, or (None, reason)."""
        return self.finish(clip, self.attempt(clip, self.read, clip))

    def finish(self, clip: Clip, found):
        """`extract` from what `read` found, or from a reason."""
        return found if found[0] is None else self.attempt(clip, self.encode, *found)


_worker_job = None


def _start_worker(sequence, spec, codec_folder, video, text_rows):
    global _worker_job
    # One process per core: further threads only get into each other's way, and an accelerator
    # has no room for several processes.
    threadpool_limits(1)
    jax.config.update("jax_platforms", "cpu")
    encoders, codec = encoders_from_spec(spec), load_codec(codec_folder)
    _worker_job = _Job(sequence, encoders, codec, video, text_rows)
    parent = multiprocessing.parent_process()
    # A worker that waits for work does not notice that its parent was killed.
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _work(clip: Clip):
    if _worker_job.codec.on_device:
        return _worker_job.attempt(clip, _worker_job.read, clip)
    return _worker_job.extract(clip)


def _results(job: _Job, codec_folder: Path, clips: list[Clip], workers: int):
    """_Job.extract of every clip, in order, from `workers` processes.

    A codec that wants an accelerator, or all cores, works in this process alone.
    """
    if workers <= 1:
        yield from map(job.extract, clips)
        return
    finish = job.finish if job.codec.on_device else lambda clip, found: found
    spawn = multiprocessing.get_context("spawn")
    init = (job.sequence, job.encoders.spec(), codec_folder, job.video, job.text_rows)
    with concurrent.futures.ProcessPoolExecutor(workers, spawn, _start_worker, init) as pool:
        # Submitted a few at a time: results that wait to be written take memory.
        waiting = []
        try:
            for clip in clips:
                waiting.append((clip, pool.submit(_work, clip)))
                if len(waiting) >= 8 * workers:
                    clip, found = waiting.pop(0)
                    yield finish(clip, found.result())
            for clip, found in waiting:
                yield finish(clip, found.result())
        except concurrent.futures.process.BrokenProcessPool:
            raise ExtractError("a worker process died (killed, or out of memory)") from None


def _part(out: Path, chunk: int) -> tuple[Path, Path]:
    """(records, description) of a chunk; the description is written last."""
    return out / f"part-{chunk:05d}.array_record", out / f"part-{chunk:05d}.json"


def _write_part(out: Path, chunk: int, packed: list[bytes], sums, failures) -> None:
    path, description = _part(out, chunk)
    content = {"records": len(packed), "bytes": 0, "failures": failures}
    content["hash"] = hashlib.sha256(b"".join(packed)).hexdigest()[:16]
    if packed:
        records.write_shard(path, packed)
        content["bytes"] = path.stat().st_size
        content["sums"] = np.sum(sums, axis=0).tolist()
        content["fields"] = records.describe_fields(records.deserialize(packed[0]))
    with atomic_path(description) as temporary:
        temporary.write_text(json.dumps(content) + "\n")


def _claim(out: Path, settings: dict) -> None:
    """Note the settings in RECORDS, or compare them with those of the parts that are there.

    Raises:
      ExtractError: the folder holds something else.
    """
    path = out / _SETTINGS
    there = json.loads(path.read_text()) if path.exists() else {}
    if there == settings:
        return
    differing = [key for key in settings if there.get(key) != settings[key]]
    if any(out.glob("part-*")) or (out / records.MANIFEST).exists():
        raise ExtractError(
            f"{out}: holds records made with other settings (not the same: "
            f"{', '.join(differing)}); use another --out"
        )
    shutil.rmtree(out / "codec", ignore_errors=True)  # of a run that came to nothing
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(settings, indent=1) + "\n")


def _fit_codec(clips: list[Clip], sequence: SequenceConfig):
    """The linear codec for the sounds of up to _FIT_CLIPS clips, drawn at random."""
    reasons, used = [], 0

    def sounds():
        nonlocal used
        order = np.random.default_rng(0).permutation(len(clips))
        with tqdm(total=min(len(clips), _FIT_CLIPS), desc="Fitting the codec", unit="clip") as bar:
            for index in order:
                try:
                    sound = read_sound(clips[index].path, sequence, 0.0, clips[index].start)
                except MediaError as error:
                    reasons.append(str(error))
                    continue
                yield sound
                used += 1
                bar.update()
                if used == _FIT_CLIPS:
                    break

    try:
        return fit_linear_codec(sounds())
    except ValueError as error:
        if used:
            raise ExtractError(f"the codec cannot be fitted: {error}") from error
        raise ExtractError(
            f"none of {len(clips)} clips has a usable sound, the first: {reasons[0]}"
        ) from None


def _prepare_codec(out: Path, source, clips: list[Clip], sequence: SequenceConfig):
    """Put a codec into RECORDS/codec: the one that is there, that of --codec, or a new one."""
    folder = out / "codec"
    if not folder.exists():
        temporary = out / f".codec.{secrets.token_hex(4)}.tmp"
        try:
            if source is None:
                _fit_codec(clips, sequence).save(temporary)
            else:
                copy_codec(source, temporary)
            try:
                temporary.rename(folder)
            except OSError:  # another process was faster: theirs it is
                if not folder.exists():
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    codec = load_codec(folder)
    if source is not None and codec.fingerprint != load_codec(source).fingerprint:
        raise ExtractError(f"{folder} is not the codec in {source}: use another --out")
    return codec


def _merge(out: Path, chunks: int, listed: list, job: _Job) -> records.Manifest:
    """Write failures.tsv, the text features, and, last, the manifest.

    Raises:
      ExtractError: no clip could be used.
    """
    parts = [json.loads(_part(out, chunk)[1].read_text()) for chunk in range(chunks)]
    failures = listed + [failure for part in parts for failure in part["failures"]]
    with atomic_path(out / "failures.tsv") as temporary:
        lines = ["\t".join(" ".join(text.split()) for text in row) for row in failures]
        temporary.write_text("\n".join(["id\treason", *lines]) + "\n", encoding="utf-8")
    shards = [
        {"name": _part(out, chunk)[0].name, "records": part["records"], "bytes": part["bytes"]}
        for chunk, part in enumerate(parts)
        if part["records"]
    ]
    if not shards:
        for chunk in range(chunks):  # nothing here is worth going on with
            _part(out, chunk)[1].unlink()
        raise ExtractError(
            f"none of {len(failures)} clips could be used, the first: {failures[0][1]}"
        )
    with atomic_path(out / records.EMPTY_TEXT) as temporary, open(temporary, "wb") as file:
        empty_text = job.encoders.encode_text("", job.sequence).astype(np.float32)
        np.save(file, empty_text)
    captions = tqdm(job.text_rows, desc="Captions", unit="caption")
    text_table = records.write_text_table(
        out, (job.encoders.encode_text(caption, job.sequence) for caption in captions)
    )
    fields = next(part["fields"] for part in parts if part["records"])
    del fields["text_row"]
    fields["text"] = {"shape": list(empty_text.shape), "dtype": "float16"}
    mean, std = records.latent_statistics(
        np.sum([part["sums"] for part in parts if part["records"]], axis=0)
    )
    hashes = "".join(part["hash"] for part in parts)
    manifest = records.Manifest(
        sequence=job.sequence,
        encoders=job.encoders.spec(),
        codec={key: getattr(job.codec, key) for key in ("name", "fingerprint", "latent_dim")},
        has_video=job.video,
        num_records=sum(shard["records"] for shard in shards),
        num_failures=len(failures),
        fields=fields,
        latent_mean=mean.tolist(),
        latent_std=std.tolist(),
        shards=shards,
        fingerprint=hashlib.sha256(hashes.encode()).hexdigest()[:16],
        text_table=text_table,
    )
    records.write_manifest(out, manifest)
    return manifest


def extract(
    out,
    *,
    videos=None,
    sounds=None,
    captions=None,
    codec=None,
    duration: float = 8.0,
    clip_dim: int = 1024,
    sync_dim: int = 768,
    text_dim: int = 1024,
    workers: int = 1,
    shard: tuple[int, int] = (0, 1),
) -> records.Manifest | None:
    """Extract a folder of videos (or of sounds: text-audio records) into a records folder.

    Args:
      out: records folder; made, or gone on with.
      videos, sounds: folder of the clips, one of the two.
      captions: TSV with columns id and caption (see `list_clips`), or None.
      codec: codec folder; None fits the linear codec on these sounds, into out/codec.
      duration: seconds taken from the start of each clip. Shorter videos are left out, shorter
        sounds zero-padded.
      clip_dim, sync_dim, text_dim: widths of the weights-free encoders' features.
      workers: processes; the caller's `__main__` must be guarded when there are several.
      shard: (i, n): do every n-th chunk of the list from the i-th on.

    Returns:
      The manifest, or None while other shards are not done.

    Raises:
      ExtractError: nothing usable, or `out` holds something else.
      ValueError: other bad arguments.
    """
    if (videos is None) == (sounds is None):
        raise ExtractError("give the folder of the videos or that of the sounds, one of the two")
    index, count = shard
    if not 0 <= index < count:
        raise ExtractError(f"shard {index}/{count}: must be i/n with 0 <= i < n")
    out, video = Path(out), videos is not None
    lengths = {"duration": duration}
    if codec is not None:
        given = load_codec(codec)
        lengths |= {k: getattr(given, k) for k in ("sample_rate", "hop", "latent_downsample")}
    sequence = SequenceConfig(**lengths)
    suffixes = VIDEO_SUFFIXES if video else SOUND_SUFFIXES + VIDEO_SUFFIXES
    clips, listed = list_clips(videos or sounds, captions, suffixes)
    if not clips:
        raise ExtractError(f"none of {len(listed)} rows can be used, the first: {listed[0]}")

    encoders = WeightsFreeEncoders(clip_dim, sync_dim, text_dim)
    names = [[clip.id, clip.caption, clip.start] for clip in clips]
    names += [clip_id for clip_id, _ in listed]
    out.mkdir(parents=True, exist_ok=True)
    _claim(out, {
        "version": records.VERSION,
        "kind": "videos" if video else "sounds",
        "sequence": dataclasses.asdict(sequence),
        "encoders": encoders.spec(),
        "clips": hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16],
        "chunk": _CHUNK,
    })  # fmt: skip
    used = _prepare_codec(out, codec, clips, sequence)
    check_codec(used, sequence)
    # Every shard numbers the captions alike; repeated ones are encoded and stored once.
    text_rows = {text: row for row, text in enumerate(sorted({clip.caption for clip in clips}))}
    job = _Job(sequence, encoders, used, video, text_rows)
    if (out / records.MANIFEST).exists():
        print(f"{out}: already complete")
        return records.read_manifest(out)

    chunks = -(-len(clips) // _CHUNK)
    todo = [c for c in range(index, chunks, count) if not _part(out, c)[1].exists()]
    work = [clips[c * _CHUNK : (c + 1) * _CHUNK] for c in todo]
    results = _results(job, out / "codec", [clip for part in work for clip in part], workers)
    with tqdm(total=sum(map(len, work)), desc="Extracting", unit="clip") as bar:
        for chunk, part in zip(todo, work, strict=True):
            packed, sums, failures = [], [], []
            for clip in part:
                record, other = next(results)
                if record is None:
                    failures.append((clip.id, other))
                else:
                    packed.append(record)
                    sums.append(other)
                bar.update()
            _write_part(out, chunk, packed, sums, failures)
    missing = sum(not _part(out, chunk)[1].exists() for chunk in range(chunks))
    if missing:
        print(f"{out}: shard {index}/{count} is done, {missing} of {chunks} parts are not")
        return None
    return _merge(out, chunks, listed, job)


def define_flags(sources: bool = True):
    """The flags of this command; without `sources` those that a corpus' own command shares."""
    if sources:
        flags.DEFINE_string("videos", None, "Folder of videos.")
        flags.DEFINE_string("sounds", None, "Folder of sounds, instead of videos.")
        flags.DEFINE_string("captions", None, "TSV with the columns id and caption.")
    flags.DEFINE_string("out", None, "Records folder to write.", required=True)
    flags.DEFINE_string("codec", None, "Codec folder; without it one is fitted.")
    flags.DEFINE_float("duration", 8.0, "Seconds per clip.")
    flags.DEFINE_integer("clip_dim", 1024, "Width of the clip features.", lower_bound=1)
    flags.DEFINE_integer("sync_dim", 768, "Width of the sync features.", lower_bound=1)
    flags.DEFINE_integer("text_dim", 1024, "Width of the text features.", lower_bound=1)
    flags.DEFINE_integer("workers", os.cpu_count(), "Processes.", lower_bound=1)
    flags.DEFINE_string("shard", "0/1", "i/n: this process does the i-th of n shares.")


def settings_from_flags() -> dict:
    """Arguments of `extract` from those flags, apart from `out`.

    Raises:
      ExtractError: --shard is not i/n.
    """
    names = [n for n in inspect.signature(extract).parameters if n not in ("out", "shard")]
    index, _, count = flags.FLAGS.shard.partition("/")
    if not (index.isdecimal() and count.isdecimal()):
        raise ExtractError("--shard must be i/n, for example 0/4")
    settings = {name: flags.FLAGS[name].value for name in names if name in flags.FLAGS}
    return settings | {"shard": (int(index), int(count))}


def main(argv):
    if argv[1:]:
        raise app.UsageError(f"not understood: {' '.join(argv[1:])}")
    show_ours()
    out = flags.FLAGS["out"].value
    try:
        manifest = extract(out, **settings_from_flags())
    except ValueError as error:
        sys.exit(f"error: {error}")
    if manifest:
        print(
            f"{out}: {manifest.num_records} records, {manifest.num_failures} clips left out"
            + (" (listed in failures.tsv)" if manifest.num_failures else "")
        )


if __name__ == "__main__":
    define_flags()
    app.run(main)

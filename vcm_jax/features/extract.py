"""The extraction command: videos or sounds and their captions become records.

    python -m vcm_jax.features.extract --videos=DIR --captions=TSV --out=RECORDS
    python -m vcm_jax.features.extract --videos=DIR --encoders=WEIGHTS --codec=DIR --out=RECORDS
    python -m vcm_jax.features.extract --sounds=DIR --segments --duration=8 --out=RECORDS

With --encoders=DIR, CLIP and Synchformer compute the features, with the weights in DIR; otherwise
encoders without weights do. The first --duration seconds of each clip are used; --segments splits
long sounds into segments of that length, ID_0, ID_1, ..., and leaves out silent ones.

The TSV has a header with the columns `id` (a file's stem, or its path inside DIR) and `caption`.
Without --captions every file of the folder is used, with an empty caption; without --codec the
linear codec is fitted on these sounds. Clips that cannot be used are listed in
RECORDS/failures.tsv, and the exit code is then 3. If interrupted, rerun the same command: it
resumes. --shard=0/4 ... --shard=3/4 divide the work between processes.
"""

import dataclasses
import hashlib
import inspect
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from absl import flags
from tqdm import tqdm

from vcm_jax.atomic import read_json, write_json
from vcm_jax.claim import claim, hold
from vcm_jax.cli import LEFT_OUT, heading, run
from vcm_jax.codec import check_codec, load_codec
from vcm_jax.features import work
from vcm_jax.features.encoders import Encoders, WeightsFreeEncoders, load_encoders
from vcm_jax.features.lengths import check_lengths
from vcm_jax.features.merge import merge
from vcm_jax.features.records_codec import prepare_codec
from vcm_jax.features.shards import Journal, shard_paths
from vcm_jax.features.work import ExtractError
from vcm_jax.media.clips import SOUND_SUFFIXES, VIDEO_SUFFIXES, Clip, list_clips
from vcm_jax.media.read import num_frames, read_frames, read_image, read_spans
from vcm_jax.records.findings import check_content
from vcm_jax.records.manifest import MANIFEST, Manifest, read_manifest
from vcm_jax.records.schema import VERSION
from vcm_jax.records.sequence import SequenceConfig
from vcm_jax.records.source import RecordSource
from vcm_jax.records.survey import survey

CLIPS_PER_SHARD = 256
LONGEST = 3600.0  # s; a clip is in memory as a whole
MEMORY_HINT = "lower --encoder_batch or --workers"
_SETTINGS = "settings.json"  # in the records folder: what its shards were made with
# Names of settings in folders that earlier versions began: {then: now}.
_FORMER_SETTINGS = {"pieces": "segments", "chunk": "clips_per_shard"}


def encode_video(
    path, sequence: SequenceConfig, encoders: Encoders
) -> tuple[np.ndarray, np.ndarray]:
    """Decode and encode a video: clip (Tc, clip_dim) and sync (Ts, sync_dim) features, float32.

    Raises:
      MediaError: unreadable, no picture, or shorter than `sequence.duration`.
    """
    frames = read_frames(path, encoders.frame_transforms(sequence), sequence.duration)
    return encoders.encode_frames(frames, sequence)


def encode_spans(
    path, sequence: SequenceConfig, encoders: Encoders, starts: Sequence[float], length: float
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`encode_video` of spans of a video, each like a clip of its own; the video is decoded once.

    Args:
      path: video file.
      sequence: lengths of a span.
      encoders: make the features.
      starts: increasing, seconds from the start of the picture.
      length: seconds of picture that there must be.

    Raises:
      MediaError: as `read_spans`.
    """
    transforms = encoders.frame_transforms(sequence)
    for frames in read_spans(path, transforms, starts, sequence.duration, length):
        yield encoders.encode_frames(frames, sequence)


def encode_image(path, sequence: SequenceConfig, encoders: Encoders) -> np.ndarray:
    """Clip features (Tc, clip_dim) of a picture that stands still, float32, as MMAudio has them.

    Raises:
      MediaError: unreadable, or no picture.
    """
    picture = read_image(path)
    # The features of one segment: all rows are those of the picture.
    short = dataclasses.replace(sequence, duration=sequence.sync_segment / sequence.sync_fps)
    frames = {
        fps: np.stack([transform(picture)] * num_frames(short.duration, fps))
        for fps, transform in encoders.frame_transforms(short).items()
    }
    clip, _ = encoders.encode_frames(frames, short)
    return np.repeat(clip[:1], sequence.clip_seq_len, axis=0)


def _claim(out: Path, settings: dict) -> None:
    """Note the settings in the records folder, or compare them with those that are there.

    Raises:
      ClaimError: the folder holds records that were made with other settings.
    """
    path = out / _SETTINGS
    begun = path.exists()
    if begun:
        there = read_json(path)
        if there.keys() & _FORMER_SETTINGS.keys():
            there = {_FORMER_SETTINGS.get(key, key): value for key, value in there.items()}
            write_json(path, there)

    def has_records():
        return any(out.glob("part-*")) or (out / MANIFEST).exists()

    if not claim(out, settings, _SETTINGS, is_begun=has_records) and begun:
        shutil.rmtree(out / "codec", ignore_errors=True)  # of a run that made no shard


def _sequence(duration: float, codec) -> SequenceConfig:
    """Lengths of the clips; a codec (folder or None) sets the sample rate and the hop."""
    if codec is None:
        return SequenceConfig(duration=duration)
    given = load_codec(codec)
    rates = {key: getattr(given, key) for key in ("sample_rate", "hop", "latent_downsample")}
    return SequenceConfig(duration=duration, **rates)


def _make_encoders(folder, dtype: str, batch_size: int, widths: dict) -> Encoders:
    """The encoders with the weights in a folder, or those without weights if it is None.

    Raises:
      ExtractError: widths are given for encoders whose weights determine them.
    """
    widths = {name: width for name, width in widths.items() if width is not None}
    if folder is None:
        return WeightsFreeEncoders(**widths)
    if widths:
        raise ExtractError(f"{', '.join(widths)}: encoders with weights have their own widths")
    return load_encoders(folder, dtype, batch_size)


def _process_shards(
    out: Path, clips: list[Clip], job: work.Job, workers: int, share: tuple[int, int]
) -> int:
    """Make this process' share of the shards that are not done yet; returns how many there are."""
    count = -(-len(clips) // CLIPS_PER_SHARD)
    todo = [n for n in range(share[0], count, share[1]) if not shard_paths(out, n)[1].exists()]
    groups = [clips[n * CLIPS_PER_SHARD : (n + 1) * CLIPS_PER_SHARD] for n in todo]
    journals = [Journal(out, number) for number in todo]
    left = [group[len(journal.entries) :] for group, journal in zip(groups, journals)]
    results = work.run(job, out / "codec", [clip for group in left for clip in group], workers)
    with tqdm(total=sum(map(len, groups)), desc="Extracting", unit="clip") as bar:
        bar.update(sum(len(journal.entries) for journal in journals))
        for number, group, journal in zip(todo, left, journals, strict=True):
            for _ in group:
                journal.append(next(results))
                bar.update()
            journal.finish(out, number)
    return count


def extract(
    out,
    *,
    videos=None,
    sounds=None,
    captions=None,
    codec=None,
    encoders=None,
    encoder_dtype: str = "float32",
    encoder_batch: int = 8,
    duration: float = 8.0,
    segments: bool = False,
    clip_dim: int | None = None,
    sync_dim: int | None = None,
    text_dim: int | None = None,
    workers: int = 1,
    shard: tuple[int, int] = (0, 1),
) -> Manifest | None:
    """Extract a folder of videos (or of sounds: text-audio records) into a records folder.

    Args:
      out: records folder; it is made, or the work in it resumes.
      videos, sounds: folder of the clips; give one of the two.
      captions: TSV with columns id and caption (see `list_clips`), or None.
      codec: codec folder; None fits the linear codec on these sounds and keeps it in out/codec.
      encoders: folder with the weights of CLIP and Synchformer; None: encoders without weights.
      encoder_dtype, encoder_batch: for encoders with weights: "float32" or "bfloat16", and the
        number of images, segments or captions in a batch.
      duration: seconds that are used of each clip. Shorter videos are left out, shorter sounds
        are zero-padded.
      segments: split each sound into consecutive segments of `duration` instead of using its
        beginning alone; clip ID gives ID_0, ID_1, ...
      clip_dim, sync_dim, text_dim: widths of the features of encoders without weights.
      workers: number of processes; with several, the caller's `__main__` must be guarded.
      shard: (i, n): make every n-th shard from the i-th on.

    Returns:
      The manifest, or None while the shards of other processes are not done.

    Raises:
      ExtractError: no clip can be used, for example because all are shorter than `duration`.
      ClaimError: `out` has records made with other settings, or another process works in it.
      ValueError: other bad arguments.
    """
    _check_arguments(out, videos, sounds, segments, shard)
    out, video = Path(out), videos is not None
    sequence = _sequence(duration, codec)
    suffixes = VIDEO_SUFFIXES if video else SOUND_SUFFIXES + VIDEO_SUFFIXES
    clips, failures = list_clips(videos if video else sounds, captions, suffixes)
    if not clips:
        first = ": ".join(failures[0])
        raise ExtractError(f"none of {len(failures)} rows can be used, the first: {first}")
    widths = {"clip_dim": clip_dim, "sync_dim": sync_dim, "text_dim": text_dim}
    encoders = _make_encoders(encoders, encoder_dtype, encoder_batch, widths)

    settings = {
        "version": VERSION,
        "kind": "videos" if video else "sounds",
        "sequence": dataclasses.asdict(sequence),
        "encoders": encoders.spec(),
        "clips": _hash_clips(clips, failures),
        "segments": segments,
        "clips_per_shard": CLIPS_PER_SHARD,
    }
    if video and not (out / "codec").exists():
        check_lengths(clips, sequence)
    with hold(out, shard):
        _claim(out, settings)
        used = prepare_codec(out, codec, clips, sequence)
        check_codec(used, sequence)
        if (out / MANIFEST).exists():
            print(f"{out}: already complete")
            return read_manifest(out)
        transforms = encoders.frame_transforms(sequence) if video else None
        job = work.Job(sequence, transforms, segments, _number_texts(clips), encoders, used)
        number = _process_shards(out, clips, job, workers, shard)
        missing = sum(not shard_paths(out, n)[1].exists() for n in range(number))
        if not missing:
            return merge(out, number, failures, job)
        print(f"{out}: share {shard[0]}/{shard[1]} is done, {missing} of {number} shards are not")
        return None


def _check_arguments(out, videos, sounds, segments: bool, shard: tuple[int, int]) -> None:
    """Raises ExtractError for arguments of `extract` that contradict each other."""
    if not str(out):
        raise ExtractError("--out is empty: name a folder")
    if (videos is None) == (sounds is None):
        raise ExtractError("give one of --videos and --sounds, not both or neither")
    if segments and sounds is None:
        raise ExtractError("--segments splits sounds, not videos")
    index, count = shard
    if not 0 <= index < count:
        raise ExtractError(f"--shard={index}/{count}: must be i/n with 0 <= i < n")


def _hash_clips(clips: list[Clip], failures: list[tuple[str, str]]) -> str:
    """Hash of the list of clips, to tell whether an extraction resumes with the same one."""
    names = [[clip.id, clip.caption, clip.start] for clip in clips]
    names += [clip_id for clip_id, _ in failures]
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]


def _number_texts(clips: list[Clip]) -> dict[str, int]:
    """{caption: row of the text table}, alike in all processes; repeated captions share a row."""
    return {text: row for row, text in enumerate(sorted({clip.caption for clip in clips}))}


def define_flags(sources: bool = True):
    """Define the flags of this command.

    Args:
      sources: whether to define the flags that name clips, which the corpus builder lacks.
    """
    heading("Input and output")
    if sources:
        flags.DEFINE_string("videos", None, "Folder of videos.")
        flags.DEFINE_string("sounds", None, "Folder of sounds, instead of videos.")
        flags.DEFINE_string("captions", None, "TSV with the columns id and caption.")
        flags.DEFINE_boolean("segments", False, "Split long sounds into segments of --duration.")
    flags.DEFINE_string("out", None, "Records folder to write.", required=True)
    flags.DEFINE_string("codec", None, "Codec folder. By default the linear codec is fitted.")
    heading("Features")
    flags.DEFINE_string("encoders", None, "Folder with the weights of CLIP and Synchformer.")
    flags.DEFINE_enum(
        "encoder_dtype", "float32", ["float32", "bfloat16"], "Number format of these encoders."
    )
    flags.DEFINE_integer(
        "encoder_batch", 8, "Images, segments or captions in a batch.", lower_bound=1
    )
    flags.DEFINE_float("duration", 8.0, "Seconds of each clip.", upper_bound=LONGEST)
    for kind, default in (("clip", 1024), ("sync", 768), ("text", 1024)):
        flags.DEFINE_integer(
            f"{kind}_dim",
            None,
            f"Width of the {kind} features of encoders without weights ({default}).",
            lower_bound=1,
        )
    heading("Work")
    flags.DEFINE_integer("workers", os.cpu_count(), "Number of processes.", lower_bound=1)
    flags.DEFINE_string("shard", "0/1", "i/n: make every n-th shard from the i-th on.")


def settings_from_flags() -> dict:
    """Arguments of `extract` from these flags, apart from `out`.

    Raises:
      ExtractError: --shard is not i/n.
    """
    names = [n for n in inspect.signature(extract).parameters if n not in ("out", "shard")]
    index, _, count = flags.FLAGS.shard.partition("/")
    if not (index.isdecimal() and count.isdecimal()):
        raise ExtractError(f"--shard={flags.FLAGS.shard}: must be i/n, for example 0/4")
    settings = {name: flags.FLAGS[name].value for name in names if name in flags.FLAGS}
    return settings | {"shard": (int(index), int(count))}


def report(out, manifest: Manifest) -> int:
    """Print how many records there are, and what the validator would say of them.

    Returns:
      The exit code of a command that made them.
    """
    source = RecordSource(out)
    for finding in check_content(source, survey(source)):
        print(finding)
    print(
        f"{out}: {manifest.num_records} records, {manifest.num_failures} clips left out"
        + (" (listed in failures.tsv)" if manifest.num_failures else "")
    )
    return LEFT_OUT if manifest.num_failures else 0


def main(args):
    manifest = extract(args.out, **settings_from_flags())
    return report(args.out, manifest) if manifest else 0


if __name__ == "__main__":
    run(main, define_flags, memory_hint=MEMORY_HINT)

"""The extraction command: videos or sounds and their captions to records.

    python -m vcm_jax.features.extract --videos=DIR --captions=TSV --out=RECORDS
    python -m vcm_jax.features.extract --sounds=DIR --captions=TSV --out=RECORDS --codec=DIR

With --encoders=DIR CLIP and Synchformer make the features, with the weights in DIR; otherwise
encoders that need none. Of a sound the first --duration seconds are taken; with --pieces all pieces
of that length, as ID_0, ID_1, ..., of which silent ones are left out.

The TSV has a header with the columns `id` (a file's stem, or its path inside DIR) and `caption`.
Without --captions every file of the folder is taken, with an empty caption; without --codec the
linear codec is fitted on these sounds. Clips that cannot be used are listed in
RECORDS/failures.tsv. A run that was stopped goes on where it was when it is started again, and
--shard=0/4 ... --shard=3/4 share the work between processes.
"""

import dataclasses
import hashlib
import inspect
import json
import os
import secrets
import shutil
import sys
from pathlib import Path

import numpy as np
from absl import app, flags
from tqdm import tqdm

from vcm_jax.atomic import atomic_path
from vcm_jax.cli import show_ours
from vcm_jax.codec import check_codec, copy_codec, fit_linear_codec, load_codec
from vcm_jax.features import work
from vcm_jax.features.encoders import Encoders, WeightsFreeEncoders, load_encoders
from vcm_jax.features.parts import Journal, part_paths, read_part
from vcm_jax.media.clips import SOUND_SUFFIXES, VIDEO_SUFFIXES, Clip, list_clips
from vcm_jax.media.read import MediaError, read_frames
from vcm_jax.records.schema import (
    EMPTY_TEXT,
    MANIFEST,
    VERSION,
    Manifest,
    latent_statistics,
    read_manifest,
    write_manifest,
    write_text_table,
)
from vcm_jax.records.sequence import SequenceConfig

_CHUNK = 256  # clips per part file
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
    if any(out.glob("part-*")) or (out / MANIFEST).exists():
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
                    sound = work.read_sound(clips[index].path, sequence, 0.0, clips[index].start)
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


def _merge(out: Path, chunks: int, listed: list, job: work.Job) -> Manifest:
    """Write failures.tsv, the text features, and, last, the manifest.

    Raises:
      ExtractError: no clip could be used.
    """
    parts = [read_part(out, chunk) for chunk in range(chunks)]
    failures = listed + [failure for part in parts for failure in part["failures"]]
    with atomic_path(out / "failures.tsv") as temporary:
        lines = ["\t".join(" ".join(text.split()) for text in row) for row in failures]
        temporary.write_text("\n".join(["id\treason", *lines]) + "\n", encoding="utf-8")
    shards = [
        {"name": part_paths(out, chunk)[0].name, "records": part["records"], "bytes": part["bytes"]}
        for chunk, part in enumerate(parts)
        if part["records"]
    ]
    if not shards:
        for chunk in range(chunks):  # nothing here is worth going on with
            part_paths(out, chunk)[1].unlink()
        raise ExtractError(
            f"none of {len(failures)} clips could be used, the first: {failures[0][1]}"
        )
    with atomic_path(out / EMPTY_TEXT) as temporary, open(temporary, "wb") as file:
        empty_text = job.encoders.encode_text("", job.sequence).astype(np.float32)
        np.save(file, empty_text)
    captions = tqdm(job.text_rows, desc="Captions", unit="caption")
    text_table = write_text_table(out, job.encoders.encode_texts(captions, job.sequence))
    fields = next(part["fields"] for part in parts if part["records"])
    del fields["text_row"]
    fields["text"] = {"shape": list(empty_text.shape), "dtype": "float16"}
    mean, std = latent_statistics(
        np.sum([part["sums"] for part in parts if part["records"]], axis=0)
    )
    hashes = "".join(part["hash"] for part in parts)
    manifest = Manifest(
        sequence=job.sequence,
        encoders=job.encoders.spec(),
        codec={key: getattr(job.codec, key) for key in ("name", "fingerprint", "latent_dim")},
        has_video=job.transforms is not None,
        num_records=sum(shard["records"] for shard in shards),
        num_failures=len(failures),
        fields=fields,
        latent_mean=mean.tolist(),
        latent_std=std.tolist(),
        shards=shards,
        fingerprint=hashlib.sha256(hashes.encode()).hexdigest()[:16],
        text_table=text_table,
    )
    write_manifest(out, manifest)
    return manifest


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
    pieces: bool = False,
    clip_dim: int | None = None,
    sync_dim: int | None = None,
    text_dim: int | None = None,
    workers: int = 1,
    shard: tuple[int, int] = (0, 1),
) -> Manifest | None:
    """Extract a folder of videos (or of sounds: text-audio records) into a records folder.

    Args:
      out: records folder; made, or gone on with.
      videos, sounds: folder of the clips, one of the two.
      captions: TSV with columns id and caption (see `list_clips`), or None.
      codec: codec folder; None fits the linear codec on these sounds, into out/codec.
      encoders: folder of weights for CLIP and Synchformer, or None: weights-free encoders.
      encoder_dtype, encoder_batch: "float32" or "bfloat16", and how many pictures, segments or
        captions at a time, for those with weights.
      duration: seconds taken from the start of each clip. Shorter videos are left out, shorter
        sounds zero-padded.
      pieces: of sounds, take all pieces of `duration` that follow each other, not the first alone;
        clip ID gives ID_0, ID_1, ...
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
    if pieces and sounds is None:
        raise ExtractError("pieces are taken of sounds, not of videos")
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

    widths = {"clip_dim": clip_dim, "sync_dim": sync_dim, "text_dim": text_dim}
    widths = {name: width for name, width in widths.items() if width is not None}
    if encoders is None:
        encoders = WeightsFreeEncoders(**widths)
    elif widths:
        raise ExtractError(f"{', '.join(widths)}: encoders with weights have their own widths")
    else:
        encoders = load_encoders(encoders, encoder_dtype, encoder_batch)
    names = [[clip.id, clip.caption, clip.start] for clip in clips]
    names += [clip_id for clip_id, _ in listed]
    out.mkdir(parents=True, exist_ok=True)
    _claim(out, {
        "version": VERSION,
        "kind": "videos" if video else "sounds",
        "sequence": dataclasses.asdict(sequence),
        "encoders": encoders.spec(),
        "clips": hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16],
        "pieces": pieces,
        "chunk": _CHUNK,
    })  # fmt: skip
    used = _prepare_codec(out, codec, clips, sequence)
    check_codec(used, sequence)
    # Every shard numbers the captions alike; repeated ones are encoded and stored once.
    text_rows = {text: row for row, text in enumerate(sorted({clip.caption for clip in clips}))}
    job = work.Job(
        sequence, encoders.frame_transforms(sequence) if video else None, pieces, text_rows,
        encoders, used,
    )  # fmt: skip
    if (out / MANIFEST).exists():
        print(f"{out}: already complete")
        return read_manifest(out)

    chunks = -(-len(clips) // _CHUNK)
    todo = [c for c in range(index, chunks, count) if not part_paths(out, c)[1].exists()]
    shares = [clips[c * _CHUNK : (c + 1) * _CHUNK] for c in todo]
    journals = [Journal(out, c) for c in todo]
    left = [share[len(journal.entries) :] for share, journal in zip(shares, journals)]
    results = work.run(job, out / "codec", [clip for share in left for clip in share], workers)
    with tqdm(total=sum(map(len, shares)), desc="Extracting", unit="clip") as bar:
        bar.update(sum(len(journal.entries) for journal in journals))
        for chunk, share, journal in zip(todo, left, journals, strict=True):
            for _ in share:
                journal.append(next(results))
                bar.update()
            journal.finish(out, chunk)
    missing = sum(not part_paths(out, chunk)[1].exists() for chunk in range(chunks))
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
        flags.DEFINE_boolean("pieces", False, "All pieces of each sound, not the first alone.")
    flags.DEFINE_string("out", None, "Records folder to write.", required=True)
    flags.DEFINE_string("codec", None, "Codec folder; without it one is fitted.")
    flags.DEFINE_string("encoders", None, "Folder of CLIP's and Synchformer's weights.")
    flags.DEFINE_enum("encoder_dtype", "float32", ["float32", "bfloat16"], "What they compute in.")
    flags.DEFINE_integer(
        "encoder_batch", 8, "Pictures, segments or captions at a time.", lower_bound=1
    )
    flags.DEFINE_float("duration", 8.0, "Seconds per clip.")
    without = "features of the encoders without weights"
    flags.DEFINE_integer("clip_dim", None, f"Width of the clip {without} (1024).", lower_bound=1)
    flags.DEFINE_integer("sync_dim", None, f"Width of the sync {without} (768).", lower_bound=1)
    flags.DEFINE_integer("text_dim", None, f"Width of the text {without} (1024).", lower_bound=1)
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
    except (ValueError, MemoryError) as error:
        sys.exit(f"error: {error}")
    if manifest:
        print(
            f"{out}: {manifest.num_records} records, {manifest.num_failures} clips left out"
            + (" (listed in failures.tsv)" if manifest.num_failures else "")
        )


if __name__ == "__main__":
    define_flags()
    app.run(main)

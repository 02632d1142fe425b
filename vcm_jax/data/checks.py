"""The validator's checks: each takes a survey of the records and returns findings."""

import dataclasses
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from vcm_jax.codec import load_codec
from vcm_jax.data.survey import Survey
from vcm_jax.features.encoders import encoders_from_spec
from vcm_jax.features.work import failure_reason, read_sound
from vcm_jax.media.clips import Clip, composed
from vcm_jax.media.read import read_frames, stream_offset
from vcm_jax.media.tables import read_table
from vcm_jax.records.schema import RecordError, latent_statistics
from vcm_jax.records.source import RecordSource

FEW = 0.01  # up to this share of the records, clips that are merely odd give a warning
NEAR = 0.97  # signatures with at least this cosine belong to the same recording
OFFSET = 0.1  # s between the starts of sound and picture from which there is a finding
_YOUTUBE = re.compile(r"^(.{11})_\d+(#\d+)?$")


@dataclasses.dataclass(frozen=True)
class Finding:
    """A result of a check.

    Attributes:
      level: "error" or "warning".
      what: the problem.
      count: number of records that have it.
      examples: ids of some of them.
    """

    level: str
    what: str
    count: int = 1
    examples: tuple[str, ...] = ()

    def __str__(self):
        some = f", for example {', '.join(self.examples)}" if self.examples else ""
        return f"{self.level}: {self.what} ({self.count}){some}"


def _finding(level: str, what: str, ids) -> list[Finding]:
    ids = list(ids)
    return [Finding(level, what, len(ids), tuple(map(str, ids[:5])))] if ids else []


def _odd(what: str, ids, total: int) -> list[Finding]:
    """An error if many of `total` records are odd, a warning if few are."""
    return _finding("error" if len(ids) > FEW * total else "warning", what, ids)


def _base(clip_id: str) -> str:
    """The id without the #2, #3, ... of a clip's further captions."""
    return clip_id.split("#")[0]


def check_content(source: RecordSource, found: Survey) -> list[Finding]:
    """Check ids, captions, values and latent statistics of the records by themselves."""
    total = len(source)
    findings = _finding("error", "damaged records", found.damaged)
    for what, ids in found.wrong.items():
        findings += _finding("error", what, ids)
    counts, by_hash = defaultdict(int), defaultdict(set)
    for clip_id, digest in zip(found.ids, found.hashes):
        counts[clip_id] += 1
        by_hash[digest].add(_base(clip_id))
    findings += _finding("error", "ids that occur twice", [i for i, n in counts.items() if n > 1])
    same = [" = ".join(sorted(ids)) for ids in by_hash.values() if len(ids) > 1]
    findings += _odd("clips with the same sound under other ids", same, total)
    findings += _odd("no caption", [i for i, c in zip(found.ids, found.captions) if not c], total)
    for name, what in (
        ("spread of the latents over time", "sound that never changes (silence?)"),
        ("spread of sync over time", "still picture (sync features never change)"),
        ("spread of clip over time", "still picture (clip features never change)"),
    ):
        if name in found.values:
            still = np.flatnonzero(found.values[name] < 1e-3)
            findings += _odd(what, [found.ids[i] for i in still], total)
    return findings + _check_statistics(source, found)


def _check_statistics(source: RecordSource, found: Survey) -> list[Finding]:
    """Compare the manifest's latent statistics with those of all records."""
    if not found.ids:
        return []
    mean, std = latent_statistics(found.sums)
    off = max(
        np.max(abs(mean - source.manifest.latent_mean) / np.maximum(std, 1e-6)),
        np.max(abs(std - source.manifest.latent_std) / np.maximum(std, 1e-6)),
    )
    if off <= 1e-3:
        return []
    return [Finding("error", f"latent statistics in the manifest are off by {off:.2g} std")]


def check_files(source: RecordSource) -> list[Finding]:
    """Check what training reads besides the records: the codec and the empty text's features."""
    findings = []
    try:
        codec = load_codec(source.path / "codec")
        wanted = source.manifest.codec
        wrong = [key for key in wanted if getattr(codec, key, None) != wanted[key]]
        if wrong:
            what = f"{source.path / 'codec'}: not the codec of the manifest ({', '.join(wrong)})"
            findings.append(Finding("error", what))
    except (ValueError, OSError) as error:
        findings.append(Finding("error", str(error)))
    try:
        _ = source.empty_text
    except RecordError as error:
        findings.append(Finding("error", str(error)))
    return findings


def check_text(source: RecordSource, count: int = 64) -> list[Finding]:
    """Encode some captions again and compare the text features, those of the empty text too."""
    try:
        encoders = encoders_from_spec(source.manifest.encoders)
    except (ValueError, KeyError):
        return [Finding("warning", "text features not compared: their encoder is not available")]
    wrong = []
    for index in np.unique(np.linspace(0, len(source) - 1, count).astype(int)):
        try:
            record = source[index]
        except RecordError:
            continue
        text = encoders.encode_text(record["caption"], source.manifest.sequence)
        if not np.allclose(record["text"], text, atol=1e-2, rtol=1e-2):
            wrong.append(record["id"])
    try:
        empty = encoders.encode_text("", source.manifest.sequence)
        if not np.allclose(source.empty_text, empty, atol=1e-2, rtol=1e-2):
            wrong.append("(the empty text)")
    except RecordError:
        pass  # `check_files` reports it
    return _finding("error", "text features are not those of the caption", wrong)


def check_captions(folder: Path, found: Survey, rows: list[tuple[str, str]]) -> list[Finding]:
    """Compare with the rows (id, caption) of the list of captions.

    Every row must be a record or be listed in failures.tsv.
    """
    listed = dict(rows)
    missing = [i for i in found.ids if i not in listed]
    wrong = [i for i, c in zip(found.ids, found.captions) if i in listed and listed[i] != c]
    findings = _finding("error", "ids that the list of captions does not have", missing)
    if wrong:
        shift = _find_shift(found, rows)
        note = f"; most are those of the row {shift:+d} from theirs" if shift else ""
        findings += _finding("error", f"captions differ from the list{note}", wrong)
    excused = set()
    if (folder / "failures.tsv").exists():
        _, failures = read_table(folder / "failures.tsv")
        excused = {row.get("id") for _, row in failures}
    here = set(found.ids)
    lost = [i for i in listed if i not in excused and i not in here]
    return findings + _finding("error", "rows of the list neither here nor in failures.tsv", lost)


def _find_shift(found: Survey, rows: list[tuple[str, str]]) -> int:
    """The number of rows, from -5 to 5, by which most captions are shifted."""
    order = {clip_id: k for k, (clip_id, _) in enumerate(rows)}
    pairs = [(order[i], c) for i, c in zip(found.ids, found.captions) if i in order]

    def count_equal(shift: int) -> int:
        there = ((k + shift, c) for k, c in pairs if 0 <= k + shift < len(rows))
        return sum(rows[k][1] == c for k, c in there)

    return max(range(-5, 6), key=count_equal)


def _video(clip_id: str) -> str | None:
    """The YouTube id in a clip's id, if it has one."""
    match = _YOUTUBE.match(clip_id)
    return match and match[1]


def check_leaks(found: Survey, test: Survey) -> list[Finding]:
    """Look for clips of the test set: by id, by YouTube video, by equal and by similar sound."""
    theirs = {_base(i) for i in test.ids}
    shared = {_base(i) for i in found.ids} & theirs
    findings = _finding("error", "ids that are in the test set", shared)
    videos = {_video(i) for i in test.ids} - {None}
    other = [i for i in found.ids if _base(i) not in theirs and _video(i) in videos]
    findings += _finding("warning", "other seconds of a video that is in the test set", other)
    hashes = dict(zip(test.hashes, test.ids))
    same = [f"{i} = {hashes[h]}" for i, h in zip(found.ids, found.hashes) if h in hashes]
    findings += _finding("error", "sounds that are in the test set", same)
    near, theirs_by_content = [], test.signatures.astype(np.float32).T
    for first in range(0, len(found.ids), 4096):
        cosine = found.signatures[first : first + 4096].astype(np.float32) @ theirs_by_content
        best = cosine.argmax(axis=1)
        for k in np.flatnonzero(cosine.max(axis=1) >= NEAR):
            i, j = first + k, best[k]
            if found.hashes[i] not in hashes:
                near.append(f"{found.ids[i]} ~ {test.ids[j]} ({cosine[k, j]:.4f})")
    what = f"sounds very similar to one in the test set (cosine >= {NEAR})"
    return findings + _odd(what, near, len(found.ids))


def _shrink(frame: np.ndarray) -> np.ndarray:
    return frame[::8, ::8].astype(np.int16)


def _is_still(clip: Clip, sequence) -> bool:
    """Whether nothing in the picture changes within half a second."""
    fps = sequence.sync_fps
    frames = read_frames(clip.path, {fps: _shrink}, sequence.duration, start=clip.start)[fps]
    # Compression noise stays below half a step of 8 bits.
    change = np.abs(np.diff(frames[:: fps // 2], axis=0)).mean(axis=(1, 2, 3))
    return change.max(initial=0) < 0.5


def _media_problems(source: RecordSource, codec, record: dict, clip: Clip):
    """Yield (problem, description of the clip) for one media file."""
    sequence = source.manifest.sequence
    offset = stream_offset(clip.path)
    if abs(offset) > OFFSET:
        what = f"sound and picture start more than {OFFSET} s apart"
        yield what, f"{clip.id} ({offset:+.2f} s)"
    sound = read_sound(clip.path, sequence, 0.0, clip.start)
    if np.mean(np.abs(sound) < 1e-3) > 0.95:
        yield "almost silent (95% of it below -60 dB)", clip.id
    mean, _ = codec.encode(sound)
    a, b = (np.ravel(latents) - latents.mean() for latents in (mean, record["latent_mean"]))
    if a @ b < 0.9 * np.linalg.norm(a) * np.linalg.norm(b):
        yield "latents are not those of the file", clip.id
    if source.manifest.has_video and _is_still(clip, sequence):
        yield "still picture", clip.id


def check_media(source: RecordSource, clips: dict[str, Clip], count: int) -> list[Finding]:
    """Decode some of the media files and compare them with their records.

    Finds silence, still pictures, time stamps that put sound and picture apart, and latents that
    are not those of the file: the codec's on its sound must have a correlation above 0.9.

    Args:
      source: records.
      clips: {id in Unicode's composed form: clip}.
      count: how many files to decode; 0: all.
    """
    try:
        codec = load_codec(source.path / "codec")
    except (ValueError, OSError):
        return [Finding("warning", "media files not compared: the codec cannot be read")]
    wrong, absent, done = defaultdict(list), [], 0
    chosen = np.unique(np.linspace(0, len(source) - 1, count or len(source)).astype(int))
    for index in tqdm(chosen, desc="Decoding", unit="clip"):
        try:
            record = source[index]
        except RecordError:
            continue  # `survey` reports it
        clip = clips.get(composed(record["id"]))
        if clip is None:
            absent.append(record["id"])
            continue
        done += 1
        try:
            for what, description in _media_problems(source, codec, record, clip):
                wrong[what].append(description)
        except Exception as error:
            wrong["cannot be read again"].append(failure_reason(clip, error))
    findings = _finding("warning", "media files not found for records", absent)
    for what, ids in wrong.items():
        hard = what.startswith(("latents", "cannot"))
        findings += _finding("error", what, ids) if hard else _odd(what, ids, done)
    return findings

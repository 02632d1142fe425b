"""The validator's checks: each takes a survey of the records and returns findings."""

import re
from collections import defaultdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from vcm_jax.codec import load_codec
from vcm_jax.features.encoders import encoders_from_spec
from vcm_jax.features.work import failure_reason, read_sound
from vcm_jax.media.clips import Clip, composed
from vcm_jax.media.read import read_frames, stream_offset
from vcm_jax.media.tables import read_table
from vcm_jax.records.findings import Finding, base, finding, odd
from vcm_jax.records.schema import RecordError
from vcm_jax.records.source import RecordSource
from vcm_jax.records.survey import Survey

NEAR = 0.97  # signatures with at least this cosine belong to the same recording
OFFSET = 0.1  # s between the starts of sound and picture from which there is a finding
_OTHER_LATENTS, _UNREADABLE = "latents are not those of the file", "cannot be read again"
_STILL = "still picture"
# What is no matter of how many clips have it; all else is an error if many do.
_LEVELS = {_OTHER_LATENTS: "error", _UNREADABLE: "error", _STILL: "warning"}
_YOUTUBE = re.compile(r"^(.{11})_\d+(#\d+)?$")


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
    return finding("error", "text features are not those of the caption", wrong)


def check_captions(folder: Path, found: Survey, rows: list[tuple[str, str]]) -> list[Finding]:
    """Compare with the rows (id, caption) of the list of captions.

    Every row must be a record or be listed in failures.tsv.
    """
    listed = dict(rows)
    missing = [i for i in found.ids if i not in listed]
    wrong = [i for i, c in zip(found.ids, found.captions) if i in listed and listed[i] != c]
    findings = finding("error", "ids that the list of captions does not have", missing)
    if wrong:
        shift = _find_shift(found, rows)
        note = f"; most are those of the row {shift:+d} from theirs" if shift else ""
        findings += finding("error", f"captions differ from the list{note}", wrong)
    excused = set()
    if (folder / "failures.tsv").exists():
        _, failures = read_table(folder / "failures.tsv")
        excused = {row.get("id") for _, row in failures}
    here = set(found.ids)
    lost = [i for i in listed if i not in excused and i not in here]
    return findings + finding("error", "rows of the list neither here nor in failures.tsv", lost)


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
    theirs = {base(i) for i in test.ids}
    shared = {base(i) for i in found.ids} & theirs
    findings = finding("error", "ids that are in the test set", shared)
    videos = {_video(i) for i in test.ids} - {None}
    other = [i for i in found.ids if base(i) not in theirs and _video(i) in videos]
    findings += finding("warning", "other seconds of a video that is in the test set", other)
    hashes = dict(zip(test.hashes, test.ids))
    same = [f"{i} = {hashes[h]}" for i, h in zip(found.ids, found.hashes) if h in hashes]
    findings += finding("error", "sounds that are in the test set", same)
    near, theirs_by_content = [], test.signatures.astype(np.float32).T
    for first in range(0, len(found.ids), 4096):
        cosine = found.signatures[first : first + 4096].astype(np.float32) @ theirs_by_content
        best = cosine.argmax(axis=1)
        for k in np.flatnonzero(cosine.max(axis=1) >= NEAR):
            i, j = first + k, best[k]
            if found.hashes[i] not in hashes:
                near.append(f"{found.ids[i]} ~ {test.ids[j]} ({cosine[k, j]:.4f})")
    what = f"sounds very similar to one in the test set (cosine >= {NEAR})"
    return findings + odd(what, near, len(found.ids))


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
        yield _OTHER_LATENTS, clip.id
    if source.manifest.has_video and _is_still(clip, sequence):
        yield _STILL, clip.id


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
            wrong[_UNREADABLE].append(failure_reason(clip, error))
    findings = finding("warning", "media files not found for records", absent)
    for what, ids in wrong.items():
        if what in _LEVELS:
            findings += finding(_LEVELS[what], what, ids)
        else:
            findings += odd(what, ids, done)
    return findings

"""Are these records fit to train on? The findings in the terminal, and a page to look at.

    python -m vcm_jax.data.validate RECORDS [--videos=DIR | --sounds=DIR] [--captions=TSV]
        [--against=TEST_RECORDS] [--page=validate.html]

reads every record of the folder; with the media files it also decodes --media_clips of them, with
the list of captions it compares every caption, with the records of a test set it looks for leaks.
Exit code 0: fit; 1: not fit, each error says why; warnings alone do not make records unfit.
"""

import dataclasses
import hashlib
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from absl import app, flags
from tqdm import tqdm

from vcm_jax.codec import load_codec
from vcm_jax.data.validate_page import write_page
from vcm_jax.features.encoders import encoders_from_spec
from vcm_jax.features.work import read_sound
from vcm_jax.media.clips import SOUND_SUFFIXES, VIDEO_SUFFIXES, Clip, list_clips, read_captions
from vcm_jax.media.read import MediaError, read_frames, stream_offset
from vcm_jax.records.schema import RecordError, latent_statistics, latent_sums
from vcm_jax.records.source import RecordSource

FEW = 0.01  # share of the records beyond which what is odd in one clip is an error
NEAR = 0.97  # cosine of two signatures from which clips count as the same recording
PIECES = 32  # of a clip, in a signature
OFFSET = 0.1  # s between the start of sound and picture that is worth a line
_LIMIT = 1e3  # larger features are not those of an encoder
_YOUTUBE = re.compile(r"^(.{11})_\d+(#\d+)?$")


@dataclasses.dataclass(frozen=True)
class Finding:
    """level "error" or "warning"; what was found; how many records; the ids of some."""

    level: str
    what: str
    count: int = 1
    examples: tuple[str, ...] = ()

    def __str__(self):
        some = f", for example {', '.join(self.examples)}" if self.examples else ""
        return f"{self.level}: {self.what} ({self.count}){some}"


@dataclasses.dataclass
class Survey:
    """What one pass over a records folder gives, index by index.

    Attributes:
      ids, captions, hashes: of each readable record; hashes of its latents.
      signatures: (records, PIECES C) float16, see `signature`.
      values: {name: (records,)} of each record: what the page's histograms show.
      damaged: messages of the records that cannot be read.
      wrong: {what: ids} of records with values that no clip has.
      sums: `latent_sums` over all.
    """

    ids: list[str]
    captions: list[str]
    hashes: list[bytes]
    signatures: np.ndarray
    values: dict[str, np.ndarray]
    damaged: list[str]
    wrong: dict[str, list[str]]
    sums: np.ndarray


def signature(latent_mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """What tells a recording from others, a vector (PIECES C) of length 1.

    The latents (N, C) over the square root of their stds (noise rules the small channels if they
    count as much as the large), averaged over PIECES parts of the clip, less their mean over time
    (which is alike in many clips). Measured with the linear codec on 308 sounds of all kinds: the
    cosine with the same sound at half the level or through MP3 is above 0.97 in 19 of 20 clips,
    with the same sound 50 ms later above 0.9; two different sounds that fill the clip reached 0.73,
    drum beats followed by silence 0.98. It does not find what is shifted further.
    """
    scaled = np.asarray(latent_mean, np.float64) / np.sqrt(np.maximum(std, 1e-6))
    edges = np.arange(PIECES) * len(scaled) // PIECES
    counts = np.diff(np.append(edges, len(scaled)))[:, None]
    parts = np.add.reduceat(scaled, edges, axis=0) / np.maximum(counts, 1)
    parts = (parts - parts.mean(axis=0)).reshape(-1)
    return (parts / max(np.linalg.norm(parts), 1e-12)).astype(np.float16)


def survey(source: RecordSource) -> Survey:
    """Read every record once; memory grows by under 2 KB a record."""
    found = Survey([], [], [], np.zeros(0), {}, [], defaultdict(list), 0.0)
    std = np.array(source.manifest.latent_std)
    values, signatures = defaultdict(list), []
    for index in tqdm(range(len(source)), desc=f"Reading {source.path.name}", unit="record"):
        try:
            record = source[index]
        except RecordError as error:
            found.damaged.append(str(error))
            continue
        latents = record["latent_mean"]
        arrays = {name: record[name].astype(np.float32) for name in source.manifest.fields}
        for name, array in arrays.items():
            if not np.isfinite(array).all():
                found.wrong[f"{name} is not finite"].append(record["id"])
            elif abs(array).max(initial=0) > _LIMIT:
                found.wrong[f"{name} exceeds {_LIMIT:g}"].append(record["id"])
            values[f"rms of {name}"].append(np.sqrt(np.mean(np.square(array, dtype=np.float64))))
        if (arrays["latent_std"] < 0).any():
            found.wrong["latent_std is negative"].append(record["id"])
        values["spread of the latents over time"].append(latents.std(axis=0).mean())
        if "sync" in arrays:
            values["spread of sync over time"].append(arrays["sync"].std(axis=0).mean())
            values["spread of clip over time"].append(arrays["clip"].std(axis=0).mean())
        values["words in the caption"].append(len(record["caption"].split()))
        found.ids.append(record["id"])
        found.captions.append(record["caption"])
        found.hashes.append(hashlib.sha256(np.ascontiguousarray(latents).tobytes()).digest()[:16])
        signatures.append(signature(latents, std))
        found.sums = found.sums + latent_sums(latents, arrays["latent_std"])
    found.signatures = np.array(signatures)
    found.values = {name: np.array(v) for name, v in values.items()}
    return found


def _finding(level: str, what: str, ids) -> list[Finding]:
    ids = list(ids)
    return [Finding(level, what, len(ids), tuple(map(str, ids[:5])))] if ids else []


def _odd(what: str, ids, total: int) -> list[Finding]:
    """An error if there are many, a warning if there are few."""
    return _finding("error" if len(ids) > FEW * total else "warning", what, ids)


def check_content(source: RecordSource, found: Survey) -> list[Finding]:
    """What the records say of themselves."""
    manifest, total = source.manifest, len(source)
    findings = _finding("error", "damaged records", found.damaged)
    for what, ids in found.wrong.items():
        findings += _finding("error", what, ids)
    by_id, by_hash = defaultdict(list), defaultdict(set)
    for clip_id, digest in zip(found.ids, found.hashes):
        by_id[clip_id].append(clip_id)
        by_hash[digest].add(clip_id.split("#")[0])  # #2, #3: further captions of a clip
    findings += _finding(
        "error", "ids that occur twice", [i for i, n in by_id.items() if len(n) > 1]
    )
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
    if len(found.ids):
        mean, std = latent_statistics(found.sums)
        off = max(
            np.max(abs(mean - manifest.latent_mean) / np.maximum(std, 1e-6)),
            np.max(abs(std - manifest.latent_std) / np.maximum(std, 1e-6)),
        )
        if off > 1e-3:
            findings.append(
                Finding("error", f"latent statistics in the manifest are off by {off:.2g} std")
            )
    return findings


def check_text(source: RecordSource, found: Survey, count: int = 64) -> list[Finding]:
    """Encode some captions again: are the text features those of the captions?"""
    try:
        encoders = encoders_from_spec(source.manifest.encoders)
    except (ValueError, KeyError):
        return [Finding("warning", "text features not compared: their encoder is not at hand")]
    wrong = []
    for index in np.unique(np.linspace(0, len(source) - 1, count).astype(int)):
        try:
            record = source[index]
        except RecordError:
            continue
        text = encoders.encode_text(record["caption"], source.manifest.sequence)
        if not np.allclose(record["text"], text, atol=1e-2, rtol=1e-2):
            wrong.append(record["id"])
    return _finding("error", "text features are not those of the caption", wrong)


def check_captions(folder: Path, found: Survey, rows: list[tuple[str, str]]) -> list[Finding]:
    """Compare with the rows (id, caption) of the TSV; rows left out must be in failures.tsv."""
    listed = dict(rows)
    missing = [i for i in found.ids if i not in listed]
    wrong = [i for i, c in zip(found.ids, found.captions) if i in listed and listed[i] != c]
    findings = _finding("error", "ids that the list of captions does not have", missing)
    if wrong:
        order = {clip_id: k for k, (clip_id, _) in enumerate(rows)}
        texts = [caption for _, caption in rows]
        agree = lambda shift: sum(
            0 <= order[i] + shift < len(texts) and texts[order[i] + shift] == c
            for i, c in zip(found.ids, found.captions)
            if i in order
        )
        shift = max(range(-5, 6), key=agree)
        note = f"; most are those of the row {shift:+d} from theirs" if shift else ""
        findings += _finding("error", f"captions differ from the list{note}", wrong)
    failures = folder / "failures.tsv"
    excused = set()
    if failures.exists():
        lines = failures.read_text(encoding="utf-8").splitlines()[1:]
        excused = {line.split("\t")[0] for line in lines}
    here = set(found.ids)
    lost = [i for i in listed if i not in excused and i not in here]
    return findings + _finding("error", "rows of the list neither here nor in failures.tsv", lost)


def check_leaks(found: Survey, test: Survey) -> list[Finding]:
    """Clips of the test set among these: by id, by YouTube video, by content, nearly by content."""
    base = lambda clip_id: clip_id.split("#")[0]
    theirs = {base(i) for i in test.ids}
    findings = _finding(
        "error", "ids that are in the test set", {base(i) for i in found.ids} & theirs
    )
    video = lambda clip_id: (m := _YOUTUBE.match(clip_id)) and m[1]
    videos = {video(i) for i in test.ids} - {None}
    other = [i for i in found.ids if base(i) not in theirs and video(i) in videos]
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
    return findings + _odd(
        f"sounds very like one in the test set (cosine >= {NEAR})", near, len(found.ids)
    )


def check_media(source: RecordSource, clips: dict[str, Clip], count: int) -> list[Finding]:
    """Decode some of the files: silence, still pictures, time stamps, and whether the latents are
    those of the file (the codec's on its sound: correlation above 0.9)."""
    codec, sequence = load_codec(source.path / "codec"), source.manifest.sequence
    wrong, absent, done = defaultdict(list), [], 0
    small = lambda frame: frame[::8, ::8].astype(np.int16)
    chosen = np.unique(np.linspace(0, len(source) - 1, count or len(source)).astype(int))
    for index in tqdm(chosen, desc="Decoding", unit="clip"):
        try:
            record = source[index]
            clip = clips.get(record["id"])
            if clip is None:
                absent.append(record["id"])
                continue
            done += 1
            offset = stream_offset(clip.path)
            if abs(offset) > OFFSET:
                wrong[f"sound and picture start more than {OFFSET} s apart"].append(
                    f"{clip.id} ({offset:+.2f} s)"
                )
            sound = read_sound(clip.path, sequence, 0.0, clip.start)
            if np.mean(np.abs(sound) < 1e-3) > 0.95:
                wrong["almost silent (95% of it below -60 dB)"].append(clip.id)
            mean, _ = codec.encode(sound)
            pair = [(np.ravel(m) - m.mean()) for m in (mean, record["latent_mean"])]
            norm = np.linalg.norm(pair[0]) * np.linalg.norm(pair[1])
            if pair[0] @ pair[1] < 0.9 * norm:
                wrong["latents are not those of the file"].append(clip.id)
            if source.manifest.has_video:
                fps = sequence.sync_fps
                frames = read_frames(clip.path, {fps: small}, sequence.duration, clip.start)[fps]
                # Half a second apart; compression noise is below half a step of 8 bits.
                change = np.abs(np.diff(frames[:: fps // 2], axis=0)).mean(axis=(1, 2, 3))
                if change.max(initial=0) < 0.5:
                    wrong["still picture"].append(clip.id)
        except (MediaError, RecordError) as error:
            wrong["cannot be read again"].append(str(error))
    findings = _finding("warning", "media files not found for records", absent)
    for what, ids in wrong.items():
        hard = what.startswith(("latents", "cannot"))
        findings += _finding("error", what, ids) if hard else _odd(what, ids, done)
    return findings


def validate(
    folder,
    *,
    videos=None,
    sounds=None,
    captions=None,
    against=None,
    media_clips: int = 200,
    page=None,
) -> list[Finding]:
    """All checks that the arguments allow; writes the page. See the module.

    Raises:
      ValueError: a list, a folder of media or a codec that cannot be used.
    """
    try:
        source = RecordSource(folder)
        other = RecordSource(against) if against else None
    except RecordError as error:
        return [Finding("error", str(error))]
    found = survey(source)
    findings = check_content(source, found) + check_text(source, found)
    clips, media = {}, videos or sounds
    if media:
        suffixes = VIDEO_SUFFIXES if videos else SOUND_SUFFIXES + VIDEO_SUFFIXES
        listed, _ = list_clips(media, captions, suffixes)
        # Without a list an id may be a path or a stem.
        clips = {} if captions else {clip.path.stem: clip for clip in listed}
        clips |= {clip.id: clip for clip in listed}
        findings += check_media(source, clips, media_clips)
    if captions:
        rows = [(row[0], row[1]) for row in read_captions(captions)]
        findings += check_captions(Path(folder), found, rows)
    if other:
        findings += check_leaks(found, survey(other))
    findings.sort(key=lambda finding: finding.level != "error")
    if page:
        write_page(page, source, found, findings, clips)
    return findings


def _define_flags():
    flags.DEFINE_string("videos", None, "Folder of the videos.")
    flags.DEFINE_string("sounds", None, "Folder of the sounds, for records without pictures.")
    flags.DEFINE_string("captions", None, "TSV that the records were made from.")
    flags.DEFINE_string("against", None, "Records of the test set: look for leaks.")
    flags.DEFINE_integer("media_clips", 200, "Media files to decode; 0: all.", lower_bound=0)
    flags.DEFINE_string("page", None, "HTML page to write; RECORDS/validate.html by default.")


def main(argv):
    if len(argv) != 2:
        raise app.UsageError("name one records folder")
    names = ("videos", "sounds", "captions", "against", "media_clips")
    page = flags.FLAGS["page"].value or Path(argv[1], "validate.html")
    try:
        findings = validate(argv[1], page=page, **{n: flags.FLAGS[n].value for n in names})
    except ValueError as error:
        sys.exit(f"error: {error}")
    for finding in findings:
        print(finding)
    fit = not any(finding.level == "error" for finding in findings)
    if Path(page).exists():
        print(f"{page}: a page to look at")
    print(f"{argv[1]}: {'fit' if fit else 'NOT fit'} to train on")
    sys.exit(0 if fit else 1)


if __name__ == "__main__":
    _define_flags()
    app.run(main)

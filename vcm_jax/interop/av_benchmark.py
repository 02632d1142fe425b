"""Prepares and runs av-benchmark, whose caches of features `vcm_jax.evaluate` reads.

    python -m vcm_jax.interop.av_benchmark --audio=TRUE_SOUNDS --videos=VIDEOS --out=OUT_OF_TRUE
    python -m vcm_jax.interop.av_benchmark --audio=SOUNDS --out=OUT_OF_GENERATED

av-benchmark (github.com/hkchengrex/av-benchmark) is the protocol of MMAudio's and SoundVCM's
tables. First this command prepares its input: OUT/audio has mono wav files of exactly 8 s in their
own sample rate, OUT/videos links to the videos, and all names are such that av-benchmark's rule
for file names does not change them; names.tsv lists them. Then the command runs the installed
av-benchmark, which needs PyTorch and a GPU, into OUT/cache, and checks that it dropped no clip. A
cache of other clips is removed first. Sounds of `vcm_jax.generate` are used as the network made
them, before its limiter. Give --videos for the true sounds only: generated sounds are
compared with these videos. Give --captions on both sides for CLAP scores. Then compare:

    python -m vcm_jax.evaluate --pred=OUT_OF_GENERATED/cache --truth=OUT_OF_TRUE/cache
"""

import csv
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import soundfile
from absl import flags
from tqdm import tqdm

from vcm_jax.atomic import atomic_folder, atomic_path
from vcm_jax.claim import hold
from vcm_jax.cli import run
from vcm_jax.interop.state_dict import StateDictError, as_array, import_torch, list_few, read_tree
from vcm_jax.media.clips import SOUND_SUFFIXES, VIDEO_SUFFIXES, list_clips
from vcm_jax.media.read import probe, read_audio
from vcm_jax.media.write import find_as_made

INSTALL = (
    "it is not on any package index: git clone https://github.com/hkchengrex/av-benchmark && "
    "pip install --editable av-benchmark (a plain pip install git+https://github.com/hkchengrex/"
    "av-benchmark lacks its scripts for videos and captions)"
)
_SHORT_BY = 0.1  # seconds that a clip may be too short; they are filled with silence
_MANIFEST, _NAMES = "manifest.json", "names.tsv"
AUDIO_FILES = ("pann_features", "vggish_features", "passt_features_embed", "passt_logits")
_SYNCED_FILES = ("imagebind_audio", "synchformer_audio")
_VIDEO_FILES = ("imagebind_video", "synchformer_video")
_CLAP_FILES = ("clap_laion_audio", "clap_ms_audio")
_TEXT_FILES = ("clap_laion_text", "clap_ms_text")
CACHE_FILES = AUDIO_FILES + _SYNCED_FILES + _VIDEO_FILES + _CLAP_FILES + _TEXT_FILES


class BenchmarkError(ValueError):
    """Input that av-benchmark cannot take, or output of it that is wrong; one line."""


def clean_sample_name(name: str) -> str:
    """av-benchmark's rule from a file's name to a clip's: the length alone decides."""
    start, end = {30: (10, 28), 20: (0, 18), 21: (1, 19)}.get(len(name), (0, None))
    return name[start:end]


def safe_name(clip: str) -> str:
    """A file name for the clip that `clean_sample_name` does not change."""
    name = clip.replace("/", "__")
    while clean_sample_name(name) != name:
        name += "_"
    return name


def read_cache(path) -> dict[str, object]:
    """One file of a cache: clip -> array (pann_features: clip -> {layer: array}), in file order.

    Arrays are mapped into memory, and not read, if the format allows it.

    Raises:
      StateDictError: there is no such file, it is damaged or no cache, or PyTorch is not installed.
    """
    tree = read_tree(path)
    if not isinstance(tree, dict) or not tree:
        raise StateDictError(f"{path}: not a cache of av-benchmark (a dict of clips and tensors)")

    def convert(clip, value):
        if isinstance(value, dict):
            return {key: convert(clip, inner) for key, inner in value.items()}
        if not hasattr(value, "detach"):
            raise StateDictError(f"{path}: {clip} holds a {type(value).__name__}, not a tensor")
        return as_array(value)

    return {str(clip): convert(clip, value) for clip, value in tree.items()}


def stored_sample_rate(path) -> int:
    """Sample rate in Hz that a file of sound or video is stored with."""
    try:
        return soundfile.info(path).samplerate
    except soundfile.SoundFileError:
        try:
            with av.open(str(path)) as container:
                return container.streams.audio[0].rate
        except (av.error.FFmpegError, OSError, IndexError):
            raise BenchmarkError(f"{path}: no sound that can be read") from None


def _digest(path: Path) -> str:
    """Hash of a file's size, first and last megabyte."""
    size, found = path.stat().st_size, hashlib.sha256()
    with open(path, "rb") as file:
        found.update(str(size).encode() + file.read(1 << 20))
        file.seek(max(0, size - (1 << 20)))
        found.update(file.read())
    return found.hexdigest()[:16]


def plan(audio, videos=None, captions=None, duration: float = 8.0) -> dict:
    """What is to be prepared, checked before anything is written.

    Args:
      audio: folder of the sounds, or of videos with sound.
      videos: folder of the videos, or None.
      captions: TSV with the columns id and caption, for the CLAP scores, or None.
      duration: seconds of each clip.

    Returns:
      {"duration", "captions", "clips": [{"id", "name", "sound", "video", "caption", "digest"}]}.

    Raises:
      BenchmarkError, ListError, MediaError: there is nothing, a sound has no video or a video no
        sound, two clips get the same name, or a clip is too short.
    """
    clips, failures = list_clips(audio, captions, SOUND_SUFFIXES + VIDEO_SUFFIXES)
    if failures:
        raise BenchmarkError(f"{len(failures)} clips of {captions}, the first: {failures[0]}")
    pictures = {}
    if videos is not None:
        pictures = {clip.id: clip.path for clip in list_clips(videos)[0]}
        ids = {clip.id for clip in clips}
        for those, these, what in (
            (ids, pictures.keys(), f"{videos} has no video of"),
            (pictures.keys(), ids, f"{audio} has no sound of"),
        ):
            if lacking := those - these:
                raise BenchmarkError(f"{what} {len(lacking)} clips: {list_few(lacking)}")
    names = {}
    for clip in clips:
        name = safe_name(clip.id)
        if name in names:
            raise BenchmarkError(f"{names[name]} and {clip.id} would both be called {name}")
        names[name] = clip.id
    entries = [
        _entry(clip, name, pictures.get(clip.id), duration) for clip, name in zip(clips, names)
    ]
    return {"duration": duration, "captions": captions is not None, "clips": entries}


def _entry(clip, name: str, video: Path | None, duration: float) -> dict:
    """A clip of the plan.

    Raises:
      BenchmarkError: the sound or the video is too short.
    """
    sound = find_as_made(clip.path)
    for path in filter(None, (clip.path, video)):
        length = probe(path).duration
        if length < duration - _SHORT_BY:
            raise BenchmarkError(
                f"{path}: {length:.2f} s, av-benchmark takes clips of {duration:g} s and would "
                "drop it or fail: leave it out, or give another --duration"
            )
    return {
        "id": clip.id,
        "name": name,
        "sound": str(sound.absolute()),
        "video": video and str(video.absolute()),
        "caption": clip.caption,
        "digest": _digest(sound) + (_digest(video) if video is not None else ""),
    }


def prepare(wanted: dict, out: Path) -> None:
    """Writes OUT/audio, OUT/videos, names.tsv, captions.csv and, last, manifest.json.

    The files and the cache of another plan are removed first.

    Raises:
      MediaError: a sound that cannot be read or is too short; OUT then has no manifest.
    """
    if (out / _MANIFEST).exists() and json.loads((out / _MANIFEST).read_text()) == wanted:
        return
    ours = [out / name for name in ("audio", "videos", "cache")]
    ours += out.glob(".cache.*.tmp")  # of runs that were killed
    if not (out / _MANIFEST).exists() and any(folder.exists() for folder in ours):
        if not (out / _NAMES).exists():
            raise BenchmarkError(f"{out}: holds something else, give another --out")
    (out / _MANIFEST).unlink(missing_ok=True)
    for folder in ours:
        shutil.rmtree(folder, ignore_errors=True)
    (out / "audio").mkdir(parents=True)
    with atomic_path(out / _NAMES) as path:
        rows = [f"{clip['id']}\t{clip['name']}\n" for clip in wanted["clips"]]
        path.write_text("id\tname\n" + "".join(rows), encoding="utf-8")
    for clip in tqdm(wanted["clips"], desc="Preparing", unit="clip"):
        rate = stored_sample_rate(clip["sound"])
        samples = round(wanted["duration"] * rate)
        shortest = wanted["duration"] - _SHORT_BY
        audio = read_audio(clip["sound"], rate, samples, shortest)
        if not np.isfinite(audio).all():
            raise BenchmarkError(f"{clip['sound']}: holds samples that are not finite")
        with atomic_path(out / "audio" / f"{clip['name']}.wav") as path:
            soundfile.write(path, audio, rate, format="WAV", subtype="FLOAT")
        if clip["video"]:
            (out / "videos").mkdir(exist_ok=True)
            (out / "videos" / f"{clip['name']}.mp4").symlink_to(clip["video"])
    if wanted["captions"]:
        with atomic_path(out / "captions.csv") as path, open(path, "w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["name", "caption"])
            table.writerows([clip["name"], clip["caption"]] for clip in wanted["clips"])
    with atomic_path(out / _MANIFEST) as path:
        path.write_text(json.dumps(wanted, indent=1) + "\n")


def expected_files(wanted: dict) -> tuple[str, ...]:
    """Names, without their suffix, of the files of the cache that follows from a plan."""
    has_video = any(clip["video"] for clip in wanted["clips"])
    found = AUDIO_FILES + _SYNCED_FILES + (_VIDEO_FILES if has_video else ())
    return found + (_CLAP_FILES + _TEXT_FILES if wanted["captions"] else ())


def check_cache(cache: Path, wanted: dict) -> None:
    """Compares the clips in every file with those of the plan.

    Raises:
      BenchmarkError: a file has other clips.
      StateDictError: a file is missing.
    """
    names = {clip["name"] for clip in wanted["clips"]}
    for name in expected_files(wanted):
        found = set(read_cache(cache / f"{name}.pth"))
        if lacking := names - found:
            raise BenchmarkError(
                f"{name}.pth lacks {len(lacking)} of {len(names)} clips, which av-benchmark "
                f"dropped: {list_few(lacking)}"
            )
        if extra := found - names:
            raise BenchmarkError(f"{name}.pth has clips that were not given: {list_few(extra)}")


def _script(root: Path, name: str, *arguments: str) -> None:
    path = root / name
    if not path.exists():
        raise BenchmarkError(f"the installed av-benchmark has no {name}: {INSTALL}")
    done = subprocess.run([sys.executable, str(path), *arguments], cwd=root, check=False)
    if done.returncode:
        raise BenchmarkError(f"av-benchmark's {name} ended with status {done.returncode}")


def extract_features(wanted: dict, out: Path, batch_size: int, num_workers: int) -> None:
    """Runs the installed av-benchmark on what `prepare` made, into OUT/cache.

    Raises:
      BenchmarkError: av-benchmark is not installed, failed or dropped clips, or there is no GPU.
      StateDictError: PyTorch is not installed.
    """
    if (out / "cache").exists():
        print(f"{out / 'cache'}: already complete")
        return
    spec = importlib.util.find_spec("av_bench")
    if spec is None:
        raise BenchmarkError(f"{out} is prepared, but av-benchmark is not installed: {INSTALL}")
    if not import_torch("av-benchmark").cuda.is_available():
        raise BenchmarkError(f"{out} is prepared, but av-benchmark needs a CUDA GPU: none is here")
    from av_bench.extract import extract

    # A package without __init__.py has no origin, but locations.
    root = Path(next(iter(spec.submodule_search_locations))).parent
    # av-benchmark takes features that it finds in the folder, whatever they are of: the folder is
    # new.
    with atomic_folder(out / "cache") as cache:
        duration, where = wanted["duration"], str(cache.absolute())
        extract(
            out / "audio",
            cache,
            audio_length=duration,
            batch_size=batch_size,
            num_workers=num_workers,
            device="cuda",
            skip_clap=not wanted["captions"],
        )
        if (out / "videos").exists():
            _script(
                root,
                "extract_video.py",
                f"--gt_cache={where}",
                f"--video_path={(out / 'videos').absolute()}",
                f"--audio_length={duration:g}",
                f"--gt_batch_size={batch_size}",
                f"--num_workers={num_workers}",
            )
        if wanted["captions"]:
            text = (out / "captions.csv").absolute()
            _script(root, "extract_text.py", f"--text_csv={text}", f"--output_cache_path={where}")
        check_cache(cache, wanted)
    print(f"{out / 'cache'}: features of {len(wanted['clips'])} clips")


def define_flags() -> None:
    flags.DEFINE_string("audio", None, "Folder of sounds.", required=True)
    flags.DEFINE_string("videos", None, "Folder of the videos, for the true sounds.")
    flags.DEFINE_string("captions", None, "TSV with columns id and caption, for CLAP scores.")
    flags.DEFINE_string("out", None, "Folder for the input and the caches (AUDIO_av_benchmark).")
    flags.DEFINE_float("duration", 8.0, "Seconds of each clip; the protocol has 8.")
    flags.DEFINE_integer("batch_size", 32, "Clips at a time on the GPU.", lower_bound=1)
    flags.DEFINE_integer("num_workers", 8, "Processes that read sounds.", lower_bound=0)


def main(args) -> None:
    audio = Path(args.audio)
    out = Path(args.out) if args.out else audio.absolute().with_name(f"{audio.name}_av_benchmark")
    wanted = plan(audio, args.videos, args.captions, args.duration)
    with hold(out):
        prepare(wanted, out)
        print(f"{out}: {len(wanted['clips'])} clips of {args.duration:g} s prepared")
        extract_features(wanted, out, args.batch_size, args.num_workers)


if __name__ == "__main__":
    run(main, define_flags)

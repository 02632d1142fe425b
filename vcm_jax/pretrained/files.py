"""Where files of weights lie, and whether they are the published ones."""

import functools
import hashlib
import importlib.util
import re
import sys
import zipfile
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants

from vcm_jax.atomic import read_json, write_json
from vcm_jax.pretrained.table import PretrainedError, WeightFile

# In a folder of weights: checksums of the files that were fetched into it or beside it.
CHECKSUMS = "checksums.json"
# open_clip's package carries the vocabulary of CLIP in this file.
_OPEN_CLIP_VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
_VOCABULARY = ("vocab.json", "merges.txt")


def say(text: str) -> None:
    """Tells the user something that is not a result."""
    print(text, file=sys.stderr, flush=True)


def default_root() -> Path:
    """Folder of release files and converted weights, in Hugging Face's cache (HF_HOME)."""
    # As huggingface_hub.cached_assets_path has it, which would make the folder.
    return Path(constants.HF_ASSETS_CACHE).expanduser() / "vcm_jax" / "pretrained" / "mmaudio"


def locate(file: WeightFile, root: Path) -> Path | None:
    """The path of a file that is at hand, or None.

    Looks into `root`, laid out as MMAudio's own folder or flat, then into the default folder and
    into Hugging Face's cache, and for CLIP's vocabulary into an installed open_clip.
    """
    repository = file.repo.split("/")[1] if file.repo else ""
    folders = [file.folder, ".", repository]
    candidates = [root / folder / file.name for folder in folders]
    candidates.append(default_root() / file.place)
    if file.repo:
        cached = huggingface_hub.try_to_load_from_cache(
            file.repo, file.path, cache_dir=constants.HF_HUB_CACHE
        )
        candidates += [Path(cached)] if isinstance(cached, str) else []
    return next((path for path in candidates if path.is_file()), None)


def locate_all(files: tuple[WeightFile, ...], root: Path) -> dict[str, Path]:
    """{name: path} of the files that are at hand.

    Where CLIP's vocabulary is there in open_clip's form alone, it replaces the table's files.
    """
    found = {file.name: path for file in files if (path := locate(file, root))}
    if not found.keys() >= set(_VOCABULARY) and any(file.name in _VOCABULARY for file in files):
        package = importlib.util.find_spec("open_clip")
        places = [root / "clip", root, *(package.submodule_search_locations if package else ())]
        for folder in map(Path, places):
            if (other := folder / _OPEN_CLIP_VOCABULARY).is_file():
                found = {k: v for k, v in found.items() if k not in _VOCABULARY}
                return found | {_OPEN_CLIP_VOCABULARY: other}
    return found


def missing(files: tuple[WeightFile, ...], found: dict[str, Path]) -> list[WeightFile]:
    """The files that are not at hand, given what `locate_all` found."""
    replaced = _VOCABULARY if _OPEN_CLIP_VOCABULARY in found else ()
    return [file for file in files if file.name not in found and file.name not in replaced]


@functools.lru_cache
def _digest(path: Path, algorithm: str, size: int, changed: int) -> str:
    """Digest of a file; its size and time of change are part of the key under which it is kept."""
    with open(path, "rb") as opened:
        if algorithm == "git":  # of a blob, which Hugging Face gives for small files
            return hashlib.sha1(b"blob %d\0" % size + opened.read()).hexdigest()
        return hashlib.file_digest(opened, algorithm).hexdigest()


def checksum(path: Path, algorithm: str = "sha256") -> str:
    """ "ALGORITHM:HEX" of a file; algorithms are md5, sha256 and git (a blob's)."""
    status = path.stat()
    return f"{algorithm}:{_digest(path, algorithm, status.st_size, status.st_mtime_ns)}"


def forget_digests() -> None:
    """Makes the next checksums read their files again, even if size and time are the same."""
    _digest.cache_clear()


def etag_checksum(etag: str) -> str | None:
    """The checksum that Hugging Face's ETag is: sha256 of an LFS file, git's of another."""
    for algorithm, length in (("sha256", 64), ("git", 40)):
        if re.fullmatch(f"[0-9a-f]{{{length}}}", etag):
            return f"{algorithm}:{etag}"
    return None


def read_checksums(root: Path) -> dict[str, str]:
    """{name: checksum} of what was fetched; empty where nothing was."""
    path = root / CHECKSUMS
    return read_json(path) if path.exists() else {}


def note_checksum(root: Path, name: str, value: str) -> None:
    """Adds one to CHECKSUMS."""
    write_json(root / CHECKSUMS, read_checksums(root) | {name: value})


def expected_checksum(file: WeightFile, path: Path, root: Path) -> str | None:
    """The checksum that a file should have, None where nobody has published one.

    It stands in the table, or the file's ETag was noted when it was fetched; in Hugging Face's
    cache a file's blob is named by its ETag.
    """
    blob = path.resolve()
    named = etag_checksum(blob.name) if blob.parent.name == "blobs" else None
    return file.checksum or named or read_checksums(root).get(file.name)


def check_whole(path: Path) -> None:
    """Refuses a PyTorch file that is cut off or damaged, which may be any file of its kind.

    Since torch 1.6 the format is a zip archive with a checksum of every entry.

    Raises:
      PretrainedError: names the entry that is damaged.
    """
    with open(path, "rb") as opened:
        if opened.read(2) != b"PK":
            return  # an older format, or no PyTorch file: whoever reads it finds out
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # zipfile, zlib and struct have their own for damaged files
        raise PretrainedError(f"{path}: truncated or damaged ({error})") from None
    if damaged:
        raise PretrainedError(f"{path}: damaged ({damaged} fails its checksum)")

"""Fetches public weights: Hugging Face's through its own library, release files through pooch."""

import contextlib
import shutil
import warnings
from pathlib import Path

import huggingface_hub
import pooch
import requests
from huggingface_hub import constants

from vcm_jax.atomic import UNWRITABLE, atomic_path
from vcm_jax.pretrained import table
from vcm_jax.pretrained.files import (
    checksum,
    etag_checksum,
    expected_checksum,
    locate_all,
    missing,
    note_checksum,
    say,
)
from vcm_jax.pretrained.resume import ResumingDownloader
from vcm_jax.pretrained.table import LICENCES, PretrainedError, WeightFile


def origin(file: WeightFile) -> str:
    """The URL of a file."""
    if file.repo:
        return huggingface_hub.hf_hub_url(file.repo, file.path, endpoint=constants.ENDPOINT)
    return f"{table.RELEASE}/{file.name}"


def gigabytes(size: float) -> str:
    """Bytes for people: "4.12 GB", "951 MB", "525 kB"."""
    for unit, scale, digits in (("GB", 1e9, 2), ("MB", 1e6, 0)):
        if size >= scale:
            return f"{size / scale:.{digits}f} {unit}"
    return f"{max(1, size / 1e3):.0f} kB"


def announce(name: str, files: list[WeightFile], root: Path, hub: Path) -> None:
    """Says what is fetched, how much, from where and under which licence, and how to do without."""
    total = sum(file.size for file in files)
    say(f"{name} needs {len(files)} files that are not here yet, about {gigabytes(total)}:")
    for file in files:
        say(f"  {file.name:30} {gigabytes(file.size):>9}  {file.licence:12}  {origin(file)}")
    say("Licences:")
    for licence in dict.fromkeys(file.licence for file in files):
        say(f"  {licence}: {LICENCES[licence]}")
    folders = dict.fromkeys(str(hub if file.repo else root) for file in files)
    say(f"They go to {' and '.join(folders)} (set HF_HOME for another place).")
    say(
        "To use files that you have, give their folder in place of the name: MMAudio's own "
        "weights/ and ext_weights/ are recognised."
    )


def where_to_put(files: list[WeightFile], root: Path) -> str:
    """The end of a message: which file has to be put where."""
    places = ", ".join(file.place for file in files)
    if len(files) == 1:
        return f"put {origin(files[0])} into {root} as {places}"
    return f"put the files into {root} as {places}"


def check_space(sizes: list[tuple[Path, int]], what: str) -> None:
    """Refuses to start what the disks have no room for.

    Args:
      sizes: folders, which need not exist yet, and the bytes that are to be written to each.
      what: begins the message.

    Raises:
      PretrainedError: a disk has less room than its folders need.
    """
    needed = {}
    for folder, size in sizes:
        place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        key = place.stat().st_dev
        needed[key] = (place, size + needed.get(key, (place, 0))[1])
    for place, size in needed.values():
        free = shutil.disk_usage(place).free
        if free < size:
            raise PretrainedError(
                f"{what} takes about {gigabytes(size)} on the disk of {place}, where "
                f"{gigabytes(free)} are free: set HF_HOME, or fetch with --out=DIR, for another"
            )


def fetch_missing(
    name: str, files: tuple[WeightFile, ...], root: Path, into_root: bool = False
) -> dict[str, Path]:
    """Fetches what is not at hand; the caller holds the lock of `root`.

    Args:
      name: of the model, for messages.
      files: that are wanted.
      root: folder of release files.
      into_root: whether Hugging Face's files go into `root` too, not into its cache, and files
        that lie elsewhere are copied there.

    Returns:
      {name: path} of all files. Those that were fetched now have the checksums that are published.

    Raises:
      PretrainedError: no network, no such file, no space, or another checksum.
      OSError: the disk is full or cannot be written.
    """
    hub = root if into_root else Path(constants.HF_HUB_CACHE)
    found = locate_all(files, root)
    if absent := missing(files, found):
        announce(name, absent, root, hub)
        if constants.HF_HUB_OFFLINE:
            raise PretrainedError(
                f"{name}: HF_HUB_OFFLINE forbids fetching: {where_to_put(absent, root)}"
            )
        check_space([(hub if f.repo else root, f.size) for f in absent], f"fetching {name}")
    for i, file in enumerate(absent):
        try:
            _fetch(file, root, into_root)
        except PretrainedError:
            raise
        except Exception as error:  # requests', httpx's, huggingface_hub's and the disk's
            if isinstance(error, OSError) and error.errno in UNWRITABLE:
                where = hub if file.repo else root
                raise OSError(error.errno, error.strerror, str(where)) from error
            raise PretrainedError(
                f"{file.name}: {_reason(error)}; run this again to continue, or "
                f"{where_to_put(absent[i:], root)}"
            ) from error
    found = locate_all(files, root)
    return _copy_into(root, files, found) if into_root else found


def _copy_into(root: Path, files, found: dict[str, Path]) -> dict[str, Path]:
    """Copies what lies outside of `root`."""
    folders = {file.name: file.folder for file in files}
    for name, path in found.items():
        if root not in path.parents:
            target = root / folders.get(name, "clip") / name
            with atomic_path(target) as temporary:
                shutil.copyfile(path, temporary)
            found = found | {name: target}
    return found


def _reason(error: Exception) -> str:
    """One line that says why a download failed."""
    if isinstance(error, huggingface_hub.errors.GatedRepoError):
        return "its repository is gated: accept its terms in a browser, then set HF_TOKEN"
    if isinstance(error, huggingface_hub.errors.RepositoryNotFoundError):
        return "no such repository, or a token that may not read it (HF_TOKEN)"
    if isinstance(error, huggingface_hub.errors.LocalEntryNotFoundError):
        cause = error.__cause__ or error
        return f"{constants.ENDPOINT} cannot be reached ({_first_line(cause)})"
    if isinstance(error, requests.RequestException) and error.response is None and error.args:
        inner = error.args[0]
        while isinstance(inner, Exception) and inner.args:  # urllib3's, one in another
            inner = getattr(inner, "reason", None) or inner.args[0]
        return f"the connection failed ({str(inner).rpartition(': ')[2]})"
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__


def _fetch(file: WeightFile, root: Path, into_root: bool) -> None:
    if file.repo:
        _fetch_from_hub(file, root, into_root)
    else:
        _fetch_release(file, root)


def _fetch_release(file: WeightFile, root: Path) -> None:
    """Everything before the last move happens in a folder of its own, which a rerun continues."""
    target = root / file.place
    work = target.parent / f".{file.name}.download"
    work.mkdir(parents=True, exist_ok=True)
    partial = work / f"{file.name}.part"
    for leftover in work.iterdir():  # temporary files of a process that was killed
        if leftover.name not in (partial.name, file.name):
            leftover.unlink()
    with _quiet_pooch():
        for attempt in ("resumed", "fresh"):
            resumed = partial.exists()
            try:
                path = pooch.retrieve(
                    origin(file),
                    known_hash=file.checksum,
                    fname=file.name,
                    path=work,
                    downloader=ResumingDownloader(partial),
                )
                break
            except ValueError as error:
                if isinstance(error, requests.RequestException):
                    raise
                # pooch has deleted the file. What an earlier run left may have been the reason.
                if not resumed or attempt == "fresh":
                    raise PretrainedError(_other_file(file, file.checksum)) from error
    Path(path).replace(target)
    shutil.rmtree(work)
    note_checksum(root, file.name, file.checksum)


@contextlib.contextmanager
def _quiet_pooch():
    """pooch's log repeats what `announce` says."""
    logger = pooch.get_logger()
    before = logger.level
    logger.setLevel("WARNING")
    try:
        yield
    finally:
        logger.setLevel(before)


def _fetch_from_hub(file: WeightFile, root: Path, into_root: bool) -> None:
    """huggingface_hub compares lengths; the contents are compared with the checksum here."""
    place = root / file.place
    local = place.parents[len(Path(file.path).parts) - 1] if into_root else None
    before = huggingface_hub.logging.get_verbosity()
    huggingface_hub.logging.set_verbosity_error()  # its warnings say what is tried again
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about free space, which was checked for all files
            path = Path(
                huggingface_hub.hf_hub_download(
                    file.repo,
                    file.path,
                    cache_dir=constants.HF_HUB_CACHE,
                    local_dir=local,
                    library_name="vcm_jax",
                )
            )
        expected = expected_checksum(file, path, root)
        if expected is None:  # not in the cache, where the blob is named by it
            expected = etag_checksum(huggingface_hub.get_hf_file_metadata(origin(file)).etag)
    finally:
        huggingface_hub.logging.set_verbosity(before)
    if expected is None:
        return
    if checksum(path, expected.partition(":")[0]) != expected:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise PretrainedError(_other_file(file, expected))
    note_checksum(root, file.name, expected)


def _other_file(file: WeightFile, expected: str) -> str:
    kind = expected.partition(":")[0]
    return f"{origin(file)}: what came is not the published file (another {kind}); it was deleted"

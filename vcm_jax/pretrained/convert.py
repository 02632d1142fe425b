"""Converted weights: folders that are made once from the published files, and checked when used.

A converted folder holds `converted.json`, which says what it was made from (checksum, size and
time of change of each published file) and what is in it (the same of each of its own files). A file
whose size and time are the recorded ones is taken to be the recorded one, as git does; any other is
hashed again. Folders appear under their names only when they are complete.
"""

import contextlib
import dataclasses
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from vcm_jax.atomic import read_json, write_json
from vcm_jax.pretrained.files import check_whole, checksum, expected_checksum, say
from vcm_jax.pretrained.table import CODECS, ENCODERS, PretrainedError, PublicModel, WeightFile

RECORD, NETWORK = "converted.json", "network.npz"
_VERSION = 1  # another one converts again: increase it when a conversion changes
_STATISTICS = {"latent_mean", "latent_std", "empty_text"}


@dataclasses.dataclass(frozen=True)
class Component:
    """What one of the three folders is made from, and how.

    Attributes:
      name: of the folder.
      files: the published files.
      build: `build(folder, {name: path})` fills an empty folder.
      keeps_files: whether the folder links to the published files, so that they must stay.
    """

    name: str
    files: tuple[WeightFile, ...]
    build: Callable[[Path, dict[str, Path]], None]
    keeps_files: bool = False


def components(public: PublicModel, name: str) -> dict[str, Component]:
    """The network, codec and encoders of a public model."""
    vae, vocoder = CODECS[public.mode]

    def network(folder, paths):
        _convert_network(folder, paths[public.network.name], public.model)

    def codec(folder, paths):
        _convert_codec(folder, paths[vae.name], paths[vocoder.name], public.mode)

    return {
        "network": Component(name, (public.network,), network),
        "codec": Component(f"codec_{public.mode}", (vae, vocoder), codec),
        "encoders": Component("encoders", ENCODERS, _link_encoders, keeps_files=True),
    }


# The conversions import what they need when they run: JAX and Flax take seconds to import, which
# fetching and the second start can do without.


def check_ready(public: PublicModel) -> None:
    """Refuses, before anything is fetched, what could not be converted afterwards.

    Raises:
      PretrainedError: no network of this kind.
      StateDictError: no PyTorch to read the files with.
    """
    from vcm_jax.interop.state_dict import import_torch
    from vcm_jax.models import MODELS

    if public.model not in MODELS:
        raise PretrainedError(
            f"{public.network.name}: this version of vcm_jax has no network {public.model}"
        )
    import_torch("converting public weights")


def _convert_network(folder: Path, path: Path, model: str) -> None:
    from flax import traverse_util

    from vcm_jax.interop import import_network
    from vcm_jax.interop.state_dict import list_few, read_state_dict
    from vcm_jax.models import MODELS

    variables = import_network.network_from_torch(read_state_dict(path), MODELS[model], path)
    if absent := _STATISTICS - variables["stats"].keys():
        raise PretrainedError(f"{path}: holds no {list_few(absent)}, without which it is no model")
    arrays = traverse_util.flatten_dict(variables, sep="/")
    # A checkpoint would take twice the weights' memory while it is saved, and compresses what
    # cannot be compressed.
    np.savez(folder / NETWORK, **arrays)


def read_network(folder, dtype=np.float32) -> dict:
    """The variables of a converted network, on the host.

    Args:
      folder: `Pretrained.network`.
      dtype: of the parameters. Arrays are read and cast one after another, so that the memory that
        is needed is what the result takes, and one array more.

    Returns:
      `{"params": ..., "stats": ...}` of numpy arrays as `MMDiT` has them; "stats" (latent_mean,
      latent_std `C`, empty_text `Tt Dt`) are float32.

    Raises:
      PretrainedError: the file is missing or damaged.
    """
    from flax import traverse_util

    path = Path(folder) / NETWORK
    try:
        with np.load(path) as stored:  # every array has a checksum, which reading it compares
            arrays = {
                name: stored[name].astype(dtype if name.startswith("params/") else np.float32)
                for name in stored.files
            }
    except Exception as error:  # zipfile's, zlib's, numpy's and the disk's
        raise PretrainedError(f"{path}: missing or damaged ({error})") from error
    return traverse_util.unflatten_dict(arrays, sep="/")


def _convert_codec(folder: Path, vae: Path, vocoder: Path, mode: str) -> None:
    from vcm_jax.interop import import_codec
    from vcm_jax.interop.state_dict import read_state_dict

    states = read_state_dict(vae), read_state_dict(vocoder)
    import_codec.codec_from_torch(*states, mode, (vae, vocoder)).save(folder)


def _link_encoders(folder: Path, paths: dict[str, Path]) -> None:
    """The layout that `load_encoders` reads; torch converts the weights whenever it reads them."""
    (folder / "clip").mkdir()
    for name, path in paths.items():
        target = folder / name if name == ENCODERS[0].name else folder / "clip" / name
        try:
            target.symlink_to(path.resolve())
        except OSError:  # a file system without symbolic links
            shutil.copyfile(path, target)


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, moved to `folder` when the block succeeds and removed when it fails.

    What a killed process left of this kind is removed first: the caller holds a lock.
    """
    for leftover in folder.parent.glob(f".{folder.name}.*.tmp"):
        shutil.rmtree(leftover)
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if folder.exists():
            # No moment at which something incomplete has the name.
            old = folder.with_name(f".{folder.name}.old.tmp")
            folder.rename(old)
            temporary.rename(folder)
            shutil.rmtree(old)
        else:
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _status(path: Path) -> dict:
    status = path.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _contents(folder: Path) -> list[Path]:
    """Files of a converted folder that are its own, sorted."""
    paths = (Path(place) / name for place, _, names in os.walk(folder) for name in names)
    return sorted(p for p in paths if p.name != RECORD and not p.is_symlink())


def _changed(path: Path, recorded: dict, deep: bool) -> bool:
    """Whether a file is another than the recorded one; `deep` hashes it in any case."""
    status = _status(path)
    if status["size"] != recorded["size"]:
        return True
    if status["mtime_ns"] == recorded["mtime_ns"] and not deep:
        return False
    return checksum(path, recorded["checksum"].partition(":")[0]) != recorded["checksum"]


def check(
    folder: Path, component: Component, found: dict[str, Path], published: bool, deep: bool = False
) -> str | None:
    """Why a converted folder cannot be used as it is; None when it can.

    Args:
      folder: that may not exist.
      component: that it should be.
      found: the published files that are at hand.
      published: whether only the published files will do, not any that `found` has.
      deep: whether everything is hashed, also what has the recorded size and time.
    """
    try:
        record = read_json(folder / RECORD)
        if (record["version"], record["name"]) != (_VERSION, component.name):
            return "was made by another version"
        for relative, recorded in record["files"].items():
            if _changed(folder / relative, recorded, deep):
                return f"{relative} is damaged"
        for file in component.files:
            recorded = record["origins"].get(file.name)
            if recorded and published and file.checksum not in (None, recorded["checksum"]):
                return f"was not made from the published {file.name}"
        if published and not component.keeps_files:
            return None
        for name, path in found.items():
            if name not in record["origins"] or _changed(path, record["origins"][name], deep):
                return f"was made from another {name}"
            link = folder / ("clip" if name != ENCODERS[0].name else "") / name
            if component.keeps_files and not (link.exists() and link.samefile(path)):
                return f"has lost {name}"
    except FileNotFoundError as error:
        return "does not exist" if not folder.exists() else f"has lost {Path(error.filename).name}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"has a damaged {RECORD} ({type(error).__name__})"
    if component.keeps_files and (lost := record["origins"].keys() - found.keys()):
        return f"has lost {', '.join(sorted(lost))}"
    return None


def check_origin(file: WeightFile, path: Path, root: Path, published: bool) -> str:
    """The checksum of a file, compared with the published one.

    Raises:
      PretrainedError: it is damaged, or, where only the `published` one will do, another.
    """
    expected = expected_checksum(file, path, root)
    kind = expected.partition(":")[0] if expected else "sha256"
    value = checksum(path, kind)
    if expected in (None, value):
        if expected is None:
            check_whole(path)
        return value
    if published:
        raise PretrainedError(
            f"{path.resolve()}: not the published file ({value}, published is {expected}): damaged "
            "or another one. Delete it to fetch it again; give its folder in place of the name to "
            "use it"
        )
    check_whole(path)
    say(f"{path}: not the published file ({value}, published is {expected}); it is used as it is")
    return value


def convert(
    folder: Path, component: Component, paths: dict[str, Path], root: Path, published: bool
) -> None:
    """Makes the folder; the caller holds the lock.

    Args:
      folder: to make, or to replace.
      component: that it becomes.
      paths: {name: path} of its published files.
      root: folder of weights, which may hold noted checksums.
      published: whether only the published files will do.

    Raises:
      ValueError: files that are damaged, others, or do not fit.
      OSError: the disk is full or cannot be written.
    """
    known = {file.name: file for file in component.files}
    origins = {}
    for name, path in paths.items():
        file = known.get(name) or WeightFile(name, "clip", 0, "MIT")
        status = _status(path)
        origins[name] = status | {"checksum": check_origin(file, path, root, published)}
    with atomic_folder(folder) as temporary:
        component.build(temporary, paths)
        files = {
            str(path.relative_to(temporary)): _status(path) | {"checksum": checksum(path)}
            for path in _contents(temporary)
        }
        record = {"version": _VERSION, "name": component.name, "origins": origins, "files": files}
        write_json(temporary / RECORD, record)

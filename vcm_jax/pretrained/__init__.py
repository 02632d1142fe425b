"""Public weights by name, fetched, checked and converted when they are first needed."""

import contextlib
import dataclasses
import hashlib
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from vcm_jax.claim import ClaimError, hold
from vcm_jax.pretrained import convert
from vcm_jax.pretrained.convert import read_network as read_network
from vcm_jax.pretrained.downloads import check_space, fetch_missing, where_to_put
from vcm_jax.pretrained.files import (
    default_root,
    forget_digests,
    locate,
    locate_all,
    missing,
    say,
)
from vcm_jax.pretrained.table import PUBLIC_MODELS, PublicModel
from vcm_jax.pretrained.table import PretrainedError as PretrainedError
from vcm_jax.records.sequence import SequenceConfig

CONVERTED = "converted"
_WAIT = 0.5  # seconds until a folder is tried again that another process works in


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A public model on this machine, converted.

    Attributes:
      name: in the table of public models.
      model: key of `vcm_jax.models.MODELS`.
      network: folder for `read_network`; u(x, t, s, cond) `B N C` is minus MMAudio's velocity at
        the time 1 - t, whatever s is.
      codec: folder for `codec.load_codec`.
      encoders: folder for `features.encoders.load_encoders`.
      sequence: lengths at the duration of training; `sequence.sample_rate` in Hz.
      steps, guidance_scale: of the Euler sampler from t = 1 to 0 with classifier-free guidance, as
        MMAudio's own commands have them; the objective is flow matching.
      licence: of the network's weights.
    """

    name: str
    model: str
    network: Path
    codec: Path
    encoders: Path
    sequence: SequenceConfig
    steps: int
    guidance_scale: float
    licence: str


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the weights of a public model come from.

    Attributes:
      name, public: the entry of the table.
      root: folder of the files.
      published: whether files are fetched and only the published ones will do (a name was given);
        else what `root` and the caches hold is used, and nothing is fetched (a folder was given).
    """

    name: str
    public: PublicModel
    root: Path
    published: bool

    @property
    def converted(self) -> Path:
        """Folder of the converted folders: below `root`, or where that cannot be written."""
        folder = self.root / CONVERTED
        if os.access(folder if folder.exists() else self.root, os.W_OK):
            return folder
        key = hashlib.sha256(str(self.root.resolve()).encode()).hexdigest()[:8]
        return default_root() / CONVERTED / f"{self.root.name}-{key}"


def resolve(name_or_folder) -> Source:
    """What a name, a folder of weights, or the network's file in such a folder stands for.

    Raises:
      PretrainedError: nothing known; says what is.
    """
    if str(name_or_folder) in PUBLIC_MODELS:
        name = str(name_or_folder)
        return Source(name, PUBLIC_MODELS[name], default_root(), True)
    path = Path(name_or_folder).expanduser()
    files = {public.network.name: name for name, public in PUBLIC_MODELS.items()}
    if path.is_file() and path.name in files:
        folder = path.absolute().parent
        root = folder.parent if folder.name == "weights" else folder
        return Source(files[path.name], PUBLIC_MODELS[files[path.name]], root, False)
    if not path.is_dir():
        raise PretrainedError(
            f"{name_or_folder}: neither a folder nor a public model; these are "
            + ", ".join(PUBLIC_MODELS)
        )
    there = {}
    for file, name in files.items():
        places = (path / "weights" / file, path / file, path / CONVERTED / name)
        if found := next((place for place in places if place.exists()), None):
            there[name] = found
    if not there:
        raise PretrainedError(
            f"{path}: holds no network (weights/{next(iter(files))} or another of "
            f"{', '.join(PUBLIC_MODELS)})"
        )
    if len(there) > 1:
        raise PretrainedError(
            f"{path}: holds several networks: give the file of one in place of the folder, "
            + " or ".join(str(place) for place in there.values())
        )
    (name,) = there
    return Source(name, PUBLIC_MODELS[name], path, False)


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """One process at a time fetches into and converts in a folder; the others wait."""
    told = False
    while True:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(hold(root))
            except ClaimError as error:
                if not root.is_dir():
                    raise
                if not told:
                    say(f"waiting: {error}")
                told = True
                time.sleep(_WAIT)
                continue
            yield
            return


def load(name_or_folder) -> Pretrained:
    """The converted weights of a public model; whatever is missing is made first.

    Args:
      name_or_folder: a name of the table, whose files are fetched; or a folder with the files, or
        the network's file in it, from which nothing is fetched.

    Returns:
      Paths and settings. Nothing has been read into memory.

    Raises:
      PretrainedError: files that are missing, damaged or cannot be fetched.
      ValueError: files that do not fit, or no PyTorch to read them with.
      OSError: the disk is full or cannot be written.
    """
    source = resolve(name_or_folder)
    public = source.public
    return Pretrained(
        name=source.name,
        model=public.model,
        sequence=public.sequence,
        steps=public.steps,
        guidance_scale=public.guidance_scale,
        licence=public.network.licence,
        **_converted(source, ("network", "codec", "encoders")),
    )


def load_network(name_or_folder) -> Path:
    """The folder of the converted network alone, for `read_network`; otherwise as `load`."""
    return _converted(resolve(name_or_folder), ("network",))["network"]


def is_public(name_or_folder) -> bool:
    """Whether `load` knows what this is."""
    try:
        return bool(resolve(name_or_folder))
    except PretrainedError:
        return False


def _converted(source: Source, kinds: tuple[str, ...]) -> dict[str, Path]:
    """{kind: folder} of converted weights; whatever is missing is made first."""
    made = convert.components(source.public, source.name)
    wanted = {kind: made[kind] for kind in kinds}
    if _stale(source, wanted.values()):
        with locked(source.root if source.published else source.converted):
            if stale := _stale(source, wanted.values()):  # another process may have done it
                _make(source, stale)
    return {kind: source.converted / component.name for kind, component in wanted.items()}


def _stale(
    source: Source, components: Iterable[convert.Component]
) -> list[tuple[convert.Component, str]]:
    """The converted folders that cannot be used as they are, and why."""
    reasons = []
    for component in components:
        found = locate_all(component.files, source.root)
        folder = source.converted / component.name
        if reason := convert.check(folder, component, found, source.published):
            reasons.append((component, reason))
    return reasons


def _make(source: Source, stale: list[tuple[convert.Component, str]]) -> None:
    """Fetches and converts; the caller holds the lock."""
    convert.check_ready(source.public)
    files = tuple(file for component, _ in stale for file in component.files)
    if source.published:
        fetch_missing(source.name, files, source.root)
    elif absent := missing(files, locate_all(files, source.root)):
        raise PretrainedError(
            f"{source.root} lacks {', '.join(file.place for file in absent)}: "
            f"{where_to_put(absent, source.root)}, or run "
            f"python -m vcm_jax.pretrained fetch {source.name} --out={source.root}"
        )
    size = sum(f.size for made, _ in stale if not made.keeps_files for f in made.files)
    check_space([(source.converted, size)], f"converting {source.name}")
    for component, reason in stale:
        folder = source.converted / component.name
        if folder.exists():
            say(f"{folder} {reason}: it is made again")
        paths = locate_all(component.files, source.root)
        say(f"converting {', '.join(paths)}")
        convert.convert(folder, component, paths, source.root, source.published)


def fetch(name: str, out=None) -> Path:
    """Fetches the files of a public model and checks them; converts nothing.

    Args:
      name: in the table.
      out: folder for all of its files, laid out as MMAudio's; None: Hugging Face's cache and the
        default folder.

    Returns:
      The folder: `out`, or the default one.

    Raises:
      PretrainedError: an unknown name, files that are damaged or cannot be fetched.
    """
    if name not in PUBLIC_MODELS:
        raise PretrainedError(f"{name}: unknown; the public models are {', '.join(PUBLIC_MODELS)}")
    root, public = Path(out).expanduser() if out else default_root(), PUBLIC_MODELS[name]
    with locked(root):
        paths = fetch_missing(name, public.files, root, into_root=out is not None)
        for file in public.files:
            if file.name in paths:
                convert.check_origin(file, paths[file.name], root, published=True)
    return root


def verify(name_or_folder) -> list[tuple[str, str, bool]]:
    """Hashes everything that is there of a model: (file or folder, finding, whether it is good).

    Raises:
      PretrainedError: neither a name nor a folder of weights.
    """
    source = resolve(name_or_folder)
    forget_digests()
    findings = []
    for file in source.public.files:
        path = locate(file, source.root)
        if path is None:
            findings.append((file.name, "not here", True))
            continue
        try:
            value = convert.check_origin(file, path, source.root, source.published)
            findings.append((str(path), f"good ({value})", True))
        except PretrainedError as error:
            findings.append((str(path), str(error), False))
    for component in convert.components(source.public, source.name).values():
        folder = source.converted / component.name
        found = locate_all(component.files, source.root)
        reason = convert.check(folder, component, found, source.published, deep=True)
        there = folder.exists()
        findings.append((str(folder), reason or "good", not (there and reason)))
    return findings

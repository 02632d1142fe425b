"""Reads tensors that tensordict mapped into memory: a folder of raw files with `meta.json`."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from vcm_jax.interop.state_dict import list_few

_DTYPES = {
    "torch.float32": np.dtype("<f4"),
    "torch.float16": np.dtype("<f2"),
    "torch.bfloat16": np.dtype(jnp.bfloat16),
}
# Name of a tensor -> field of a record.
FIELDS = {
    "mean": "latent_mean",
    "std": "latent_std",
    "text_features": "text",
    "clip_features": "clip",
    "sync_features": "sync",
}
_VIDEO = ("clip_features", "sync_features")


class FeatureError(ValueError):
    """Features that cannot be converted; one line that names the file and what would be right."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor `N ...` in a file, which is read row by row."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype

    def rows(self, first: int, last: int) -> Iterator[np.ndarray]:
        """Rows `first` to `last` - 1, of which one at a time is in memory."""
        size = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        with open(self.path, "rb") as file:
            file.seek(first * size)
            for _ in range(first, last):
                yield np.frombuffer(file.read(size), self.dtype).reshape(self.shape[1:])


def open_tensors(folder) -> dict[str, Tensor]:
    """The tensors of a folder that tensordict wrote, by the fields of a record.

    Raises:
      FeatureError: no such folder, or tensors are missing, truncated or of other shapes.
    """
    folder = Path(folder)
    path, described = folder / "meta.json", _read_meta(folder)
    shapes = {name: shape for name, (shape, _) in described.items()}
    video = [name for name in _VIDEO if name in shapes]
    missing = [name for name in FIELDS if name not in shapes and (video or name not in _VIDEO)]
    if missing:
        raise FeatureError(
            f"{path}: no {list_few(missing)}; it has {list_few(shapes) or 'nothing'}"
        )
    tensors, count = {}, shapes["mean"][:1]
    for name, field in FIELDS.items():
        if name not in shapes:
            continue
        shape, dtype = described[name]
        if len(shape) != 3 or shape[:1] != count:
            raise FeatureError(
                f"{path}: {name} has shape {shape}, wanted is (N, length, channels) with the N of "
                f"mean, whose shape is {shapes['mean']}"
            )
        if dtype not in _DTYPES:
            raise FeatureError(f"{path}: {name} is {dtype}, known are {', '.join(_DTYPES)}")
        tensors[field] = Tensor(folder / f"{name}.memmap", shape, _DTYPES[dtype])
    if not count[0]:
        raise FeatureError(f"{path}: no clips (mean has shape {shapes['mean']})")
    if tensors["latent_mean"].shape != tensors["latent_std"].shape:
        raise FeatureError(f"{path}: mean {shapes['mean']} and std {shapes['std']} differ in shape")
    for tensor in tensors.values():
        _check_file(tensor)
    return tensors


def _read_meta(folder: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> (shape, dtype) of the tensors that `meta.json` describes."""
    path = folder / "meta.json"
    try:
        described = {
            name: value
            for name, value in json.loads(path.read_text(encoding="utf-8")).items()
            if isinstance(value, dict) and "dtype" in value
        }
        return {
            name: (tuple(map(int, value["shape"])), str(value["dtype"]))
            for name, value in described.items()
        }
    except FileNotFoundError:
        raise FeatureError(
            f"{folder}: not a folder of memory-mapped features (it has no meta.json)"
        ) from None
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise FeatureError(f"{path}: damaged ({type(error).__name__}: {error})") from None


def _check_file(tensor: Tensor) -> None:
    if not tensor.path.is_file():
        raise FeatureError(f"{tensor.path}: no such file, but meta.json lists it")
    size = tensor.path.stat().st_size
    wanted = int(np.prod(tensor.shape)) * tensor.dtype.itemsize
    if size != wanted:
        raise FeatureError(
            f"{tensor.path}: {size} bytes, {wanted} were expected for {tensor.shape} of "
            f"{tensor.dtype.name}: truncated, or of another set"
        )

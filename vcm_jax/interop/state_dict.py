"""Reads PyTorch files as dicts of NumPy arrays, and says what does not fit."""

import importlib
from pathlib import Path

import numpy as np

from vcm_jax.claim import ClaimError, contents

INSTALL_TORCH = 'needs PyTorch: pip install torch (or this package with its extra, ".[torch]")'
_WRAPPERS = ("generator", "state_dict", "model", "module")  # {"generator": {...}} and the like


class StateDictError(ValueError):
    """A file is no state dict, or not the one that is wanted; the message is one line."""


def import_torch(purpose: str):
    """The torch module.

    Raises:
      StateDictError: PyTorch is not installed; the line says what needs it and how to get it.
    """
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise StateDictError(f"{purpose} {INSTALL_TORCH}") from error


def read_tree(path):
    """What a `.pth`, `.pt`, `.bin` or `.safetensors` file holds, as tensors on the CPU.

    They are mapped into memory if the format allows it. Nothing in the file is executed.

    Raises:
      StateDictError: there is no such file, it is damaged, or PyTorch is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise StateDictError(f"{path}: no such file")
    torch = import_torch(f"reading {path.name}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except Exception as error:  # zipfile, pickle, RuntimeError, EOFError and others mean the same
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        raise StateDictError(f"{path}: truncated, or not a PyTorch file ({reason})") from error


def as_array(tensor) -> np.ndarray:
    """A tensor as a NumPy array; bfloat16 becomes float32, which holds it exactly."""
    tensor = tensor.detach()
    return (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy()


def read_state_dict(path) -> dict[str, np.ndarray]:
    """The tensors of a `.pth`, `.pt` or `.bin` file, or of a `.safetensors` file, in file order.

    A dict in another one ("generator", "state_dict", "model", "module") is unwrapped, and entries
    that are not tensors are left out. bfloat16 becomes float32. Nothing in the file is executed.

    Raises:
      StateDictError: there is no such file, it is damaged or no state dict, or PyTorch is not
        installed.
    """
    tree = read_tree(path)
    torch = import_torch(f"reading {path}")
    for key in _WRAPPERS:
        if isinstance(tree, dict) and isinstance(tree.get(key), dict):
            tree = tree[key]
    tensors = {}
    if isinstance(tree, dict):
        tensors = {str(k): v for k, v in tree.items() if isinstance(v, torch.Tensor)}
    if not tensors:
        raise StateDictError(f"{path}: holds no state dict (a dict of names and tensors)")
    return {name: as_array(value) for name, value in tensors.items()}


def _is_zip(path: Path) -> bool:
    """Whether a file has PyTorch's format since 1.6, which can be mapped into memory."""
    with open(path, "rb") as file:
        return file.read(2) == b"PK"


def check_new(out: Path) -> None:
    """Refuses to write into a folder that holds something.

    Raises:
      ClaimError: `out` is there already and not an empty folder.
    """
    if out.is_file() or contents(out):
        raise ClaimError(f"--out={out} is there already: give another folder or remove it")


def list_few(names) -> str:
    """The first few names, sorted, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def check_names(
    found: dict[str, tuple], expected: dict[str, tuple], what: str, hint: str = ""
) -> None:
    """Compares names and shapes.

    Args:
      found, expected: name -> shape.
      what: begins the message: what was found, for example the file.
      hint: ends the message: which model it looks like.

    Raises:
      StateDictError: missing or extra names, or other shapes; the line has the first few of each.
    """
    problems = []
    if missing := expected.keys() - found.keys():
        problems.append(f"missing: {list_few(missing)}")
    if extra := found.keys() - expected.keys():
        problems.append(f"not known: {list_few(extra)}")
    wrong = [
        f"{name} {tuple(found[name])} instead of {tuple(expected[name])}"
        for name in expected.keys() & found.keys()
        if tuple(found[name]) != tuple(expected[name])
    ]
    if wrong:
        problems.append(f"other shapes: {list_few(wrong)}")
    if problems:
        raise StateDictError(f"{what} does not fit: " + "; ".join(problems) + hint)

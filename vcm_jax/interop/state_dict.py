"""Reading PyTorch files as dicts of numpy arrays, and saying what does not fit."""

import importlib
from pathlib import Path

import numpy as np

INSTALL_TORCH = 'needs PyTorch: pip install torch (or this package with its extra, ".[torch]")'
_WRAPPERS = ("generator", "state_dict", "model", "module")  # {"generator": {...}} and the like


class StateDictError(ValueError):
    """A file that is no state dict, or not the one that is wanted; one line."""


def import_torch(purpose: str):
    """The torch module.

    Raises:
      StateDictError: PyTorch is not installed; says what needed it and how to get it.
    """
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise StateDictError(f"{purpose} {INSTALL_TORCH}") from error


def read_tree(path):
    """What a `.pth`, `.pt`, `.bin` or `.safetensors` file holds, on the CPU, mapped where possible.

    Nothing in the file is executed.

    Raises:
      StateDictError: no such file, damaged, or no PyTorch.
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
    except Exception as error:  # zipfile, pickle, RuntimeError, EOFError, ...: all mean the same
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        raise StateDictError(f"{path}: truncated, or not a PyTorch file ({reason})") from error


def as_array(tensor) -> np.ndarray:
    """A tensor as numpy; bfloat16 becomes float32, which holds it exactly."""
    tensor = tensor.detach()
    return (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy()


def read_state_dict(path) -> dict[str, np.ndarray]:
    """The tensors of a `.pth`, `.pt` or `.bin` file, or of a `.safetensors` file, in file order.

    A dict wrapped in another one ("generator", "state_dict", "model", "module") is unwrapped, and
    what is not a tensor is left out. bfloat16 becomes float32. Nothing in the file is executed.

    Raises:
      StateDictError: no such file, damaged, something else than a state dict, or no PyTorch.
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
    """torch's format since 1.6, which can be mapped into memory."""
    with open(path, "rb") as file:
        return file.read(2) == b"PK"


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
      what: what was found, e.g. the file; begins the message.
      hint: ends the message: which model it looks like.

    Raises:
      StateDictError: missing or extra names, or other shapes; names the first few of each.
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

"""Reads the reference numbers: deterministic weights, inputs, and arrays of the original code."""

import json
import zlib
from pathlib import Path

import numpy as np

DATA = Path(__file__).parents[1] / "fixtures"
# The full set of reference numbers, which is not in the repository: see the fixture `shared`.
SHARED = Path(__file__).parents[3] / "shared" / "golden"


def load(folder: Path, name: str):
    """(description, arrays) of one reference file."""
    with np.load(folder / f"{name}.npz") as arrays:
        return json.loads((folder / f"{name}.json").read_text()), dict(arrays)


def randn(seed: int, shape) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def uniform(seed: int, shape) -> np.ndarray:
    return np.random.RandomState(seed).uniform(0, 1, shape).astype(np.float32)


def fill(table, seed_prefix: str = "", boosted=()) -> dict[str, np.ndarray]:
    """The deterministic state dict of a table of [name, shape, rule, ...]."""
    state_dict = {}
    for name, shape, rule, *_ in table:
        seed = zlib.crc32((seed_prefix + name).encode()) & 0xFFFFFFFF
        z = np.random.RandomState(seed).standard_normal(shape)
        if name in boosted:
            z = 0.5 * z
        elif rule == "fan_in":
            z = z / np.sqrt(np.prod(shape[1:]))
        else:
            z = {"small": 0.1 * z, "one_plus": 1 + 0.1 * z}[rule]
        state_dict[name] = np.asarray(z, np.float32)
    return state_dict


def relative_error(value, reference) -> float:
    """max |difference| / std of the reference."""
    value, reference = np.asarray(value, np.float64), np.asarray(reference, np.float64)
    assert value.shape == reference.shape, (value.shape, reference.shape)
    return np.abs(value - reference).max() / reference.std()

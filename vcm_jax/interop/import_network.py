"""Converts MMAudio's network from its PyTorch file to weights that training starts from.

The folder that is written is read like a run's workdir: `--config.init_from=DIR`. Its network gives
u(x, t, s, c), which is minus MMAudio's velocity at the time 1 - t, whatever s is: our time runs
from noise (1) to data (0), MMAudio's from noise (0) to data (1).
"""

import dataclasses
from pathlib import Path

import flax.struct
import numpy as np

from vcm_jax.atomic import atomic_folder
from vcm_jax.interop.state_dict import (
    StateDictError,
    check_names,
    check_new,
    list_few,
    read_state_dict,
)
from vcm_jax.interop.weights import torch_shapes, variables_from_torch
from vcm_jax.models import MODELS, ModelConfig
from vcm_jax.models.layers import time_frequencies
from vcm_jax.models.mmdit import GUIDANCE_INPUT
from vcm_jax.runs import checkpoint

# Tables that some files hold and that our network computes itself.
_TABLES = ("t_embed.freqs", "latent_rot", "clip_rot")
# What the data determine. A file may lack them, or hold NaN if they were never filled in.
_STATS = {
    "latent_mean": "latent_mean",
    "latent_std": "latent_std",
    "empty_string_feat": "empty_text",
}
_SECOND_EMBEDDER = "h_embed."


def version(names) -> int:
    """MMAudio's version, 1 or 2, of a network whose state dict has these names."""
    return 2 if any(name.startswith("clip_input_proj.2.") for name in names) else 1


def reverse_time(weight: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """First layer (D, 2 F) of a time embedder that sees 1 - t -> of one that sees t.

    The function is its own inverse. The embedder's features are cos(t f) and sin(t f). With
    a = 1 - t, cos(a f) = cos f cos(t f) + sin f sin(t f) and
    sin(a f) = sin f cos(t f) - cos f sin(t f): each pair of columns is reflected.

    The reflection is exact but for the float32 of its result. Computing 1 - t in float32 instead
    would turn version 2's angles by up to 3e-4.
    """
    cos, sin = np.cos(frequencies), np.sin(frequencies)
    of_cos, of_sin = np.split(weight.astype(np.float64), 2, axis=1)
    reflected = np.concatenate([of_cos * cos + of_sin * sin, of_cos * sin - of_sin * cos], 1)
    return reflected.astype(np.float32)


def reverse(state_dict: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Changes MMAudio's convention to ours, and back: minus the velocity, at 1 - t."""
    changed = {
        name: -state_dict[name] for name in ("final_layer.conv.weight", "final_layer.conv.bias")
    }
    first = "t_embed.mlp.0.weight"
    weight = state_dict[first]
    frequencies = time_frequencies(version(state_dict), len(weight))
    return state_dict | changed | {first: reverse_time(weight, frequencies)}


def network_from_torch(
    state_dict: dict[str, np.ndarray], config: ModelConfig, file="the state dict", hint: str = ""
) -> dict:
    """Our variables from MMAudio's state dict (one time, 0 is noise), or from one of our own.

    A state dict with the second time embedder, as `export_torch` writes it, is in our convention
    and is taken as it is. One without it gives u(x, t, s, c) = -(MMAudio's velocity at 1 - t) for
    every s: the second embedder's last layer is zero.

    Args:
      state_dict: arrays by their names in torch.
      config: the network's sizes. Whether it has an input for guidance follows from the names.
      file, hint: beginning and end of an error's line.

    Returns:
      `{"params": ..., "stats": ...}`, float32. "stats" lacks what the file lacks.

    Raises:
      StateDictError: names or shapes are not the model's, or numbers are not finite.
    """
    ours = any(name.startswith(_SECOND_EMBEDDER) for name in state_dict)
    guided = any(name.startswith(f"{GUIDANCE_INPUT}.") for name in state_dict)
    config = dataclasses.replace(config, guidance_input=guided)
    state_dict = {n: np.asarray(v, np.float32) for n, v in state_dict.items() if n not in _TABLES}
    expected = torch_shapes(config)
    wanted = (
        expected
        if ours
        else {n: s for n, s in expected.items() if not n.startswith(_SECOND_EMBEDDER)}
    )
    if (theirs := version(state_dict)) != config.version:
        hint += (
            f" (a file of MMAudio's version {theirs}, for a network of version {config.version})"
        )
    optional = {name: wanted[name] for name in _STATS}
    found = {name: np.shape(value) for name, value in state_dict.items()}
    check_names(optional | found, wanted, str(file), hint)
    finite = {name: bool(np.isfinite(value).all()) for name, value in state_dict.items()}
    if bad := [name for name, good in finite.items() if not good and name not in _STATS]:
        raise StateDictError(f"{file}: numbers that are not finite: {list_few(bad)}")
    known = [field for name, field in _STATS.items() if finite.get(name)]
    state_dict = {
        name: np.zeros(shape, np.float32) for name, shape in optional.items()
    } | state_dict
    if not ours:
        # The first layer is drawn as in a new network: if it gave zeros, the last layer would have
        # no gradient.
        second = {n: np.zeros(s, np.float32) for n, s in expected.items() if n not in wanted}
        first = f"{_SECOND_EMBEDDER}mlp.0.weight"
        second[first] = np.float32(0.02 * np.random.default_rng(0).standard_normal(expected[first]))
        state_dict = reverse(state_dict) | second
    variables = variables_from_torch(state_dict, config)
    return variables | {"stats": {k: v for k, v in variables["stats"].items() if k in known}}


def recognise(state_dict: dict[str, np.ndarray], file) -> str:
    """Name in MODELS of the network that shares most sizes with a state dict.

    Raises:
      StateDictError: the state dict is of something else.
    """
    shapes = {name: np.shape(value) for name, value in state_dict.items()}

    def depth(kind):
        return len({name.split(".")[1] for name in shapes if name.startswith(kind)})

    def size(name, axis):
        return shapes[name][axis] if len(shapes.get(name, ())) > axis else 0

    sizes = {
        "hidden_dim": size("clip_cond_proj.weight", 0),
        "latent_dim": size("audio_input_proj.0.weight", 1),
        "clip_dim": size("empty_clip_feat", 1),
        "joint_depth": depth("joint_blocks."),
        "fused_depth": depth("fused_blocks."),
    }
    if sum(map(bool, sizes.values())) < 3:
        raise StateDictError(f"{file}: not MMAudio's network (it holds {list_few(shapes)})")
    sizes["version"] = version(shapes)
    shared = {
        name: sum(getattr(config, key) == value for key, value in sizes.items())
        for name, config in MODELS.items()
    }
    return max(shared, key=shared.get)


@flax.struct.dataclass
class _Weights:
    """The fields of a run's `TrainState` that weights are read from.

    The only EMA has width 0: the weights themselves.
    """

    step: int
    stats: dict
    ema: dict


def save(folder, variables: dict, meta: dict) -> None:
    """Writes what `averages.restore_weights` reads.

    Args:
      folder: new or empty.
      variables: `{"params": ..., "stats": ...}`.
      meta: where the weights come from; JSON.
    """
    weights = _Weights(step=0, stats=variables["stats"], ema={"0": variables["params"]})
    with checkpoint.Saver(checkpoint.open_manager(folder)) as saver:
        saver.save(0, weights, meta, wait=True)


def convert(file, out) -> None:
    """Converts a file to a folder for `--config.init_from`.

    Args:
      file: path of MMAudio's network, such as `mmaudio_small_16k.pth`, or of a file of
        `export_torch`.
      out: folder to write, new or empty; it appears when it is complete.

    Raises:
      StateDictError: a file that does not fit, or no PyTorch.
      ClaimError: `out` is there already and not an empty folder.
    """
    out = Path(out)
    check_new(out)
    state_dict = read_state_dict(file)
    name = recognise(state_dict, file)
    hint = f" (it looks most like {name})"
    variables = network_from_torch(state_dict, MODELS[name], file, hint)
    with atomic_folder(out) as temporary:
        save(temporary, variables, {"source": Path(file).name, "model": name})
    absent = set(_STATS.values()) - variables["stats"].keys()
    note = f" (the file has no {list_few(absent)}: training takes the data's)" if absent else ""
    print(f"{out}: weights of {name} for --config.init_from={out}{note}")

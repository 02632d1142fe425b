"""MMAudio's network, from its PyTorch file to weights that fine-tuning starts from.

The folder that is written is read like a run's workdir: `--config.init_from=DIR`. In it
u(x, t, s, c) is minus MMAudio's velocity at the time 1 - t, whatever s is: our time runs from noise
(1) to data (0), MMAudio's the other way.
"""

from pathlib import Path

import flax.struct
import numpy as np

from vcm_jax import checkpoint
from vcm_jax.interop.state_dict import StateDictError, check_names, read_state_dict
from vcm_jax.interop.weights import torch_shapes, variables_from_torch
from vcm_jax.models import MODELS, ModelConfig

# Tables that some files hold and that the network computes.
_TABLES = ("t_embed.freqs", "latent_rot", "clip_rot")
_SECOND_EMBEDDER = "h_embed."


def reverse_time(weight: np.ndarray) -> np.ndarray:
    """First layer of a time embedder (D, 256) that sees 1 - t -> the one that sees t; its inverse.

    The embedder's features are cos(t f) and sin(t f). With a = 1 - t,
    cos(a f) = cos f cos(t f) + sin f sin(t f) and sin(a f) = sin f cos(t f) - cos f sin(t f):
    each pair of columns is reflected.
    """
    frequencies = 10_000.0 ** (-np.arange(128) / 128)
    cos, sin = np.cos(frequencies), np.sin(frequencies)
    of_cos, of_sin = np.split(weight.astype(np.float64), 2, axis=1)
    reflected = np.concatenate([of_cos * cos + of_sin * sin, of_cos * sin - of_sin * cos], 1)
    return reflected.astype(np.float32)


def reverse(state_dict: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Velocity at 1 - t with the sign changed: MMAudio's convention to ours, and back."""
    changed = {
        name: -state_dict[name] for name in ("final_layer.conv.weight", "final_layer.conv.bias")
    }
    first = "t_embed.mlp.0.weight"
    return state_dict | changed | {first: reverse_time(state_dict[first])}


def network_from_mmaudio(state_dict: dict[str, np.ndarray], config: ModelConfig) -> dict:
    """Our variables from MMAudio's state dict (one time, 0 is noise).

    Returns:
      `{"params": ..., "stats": ...}`; u(x, t, s, c) = -(MMAudio's velocity at 1 - t) for every s:
      the second time embedder's last layer is zero.

    Raises:
      StateDictError: names or shapes are not the model's.
    """
    state_dict = {name: value for name, value in state_dict.items() if name not in _TABLES}
    expected = torch_shapes(config)
    one_time = {n: s for n, s in expected.items() if not n.startswith(_SECOND_EMBEDDER)}
    found = {name: np.shape(value) for name, value in state_dict.items()}
    check_names(found, one_time, "MMAudio's state dict")
    # The first layer is drawn as in a new network, so that the last one has something to learn
    # from.
    second = {n: np.zeros(s, np.float32) for n, s in expected.items() if n not in one_time}
    first = "h_embed.mlp.0.weight"
    second[first] = np.float32(0.02 * np.random.default_rng(0).standard_normal(expected[first]))
    return variables_from_torch(reverse(state_dict) | second, config)


def recognise(state_dict: dict[str, np.ndarray], file) -> str:
    """Name in MODELS of MMAudio's network in a state dict.

    Raises:
      StateDictError: something else; says what it looks like.
    """
    shapes = {name: np.shape(value) for name, value in state_dict.items()}
    if "clip_input_proj.2.w1.weight" in shapes:
        raise StateDictError(
            f"{file}: looks like MMAudio's version 2 (large_44k_v2), which is another network; "
            "version 1 is wanted: small_16k, small_44k, medium_44k or large_44k"
        )
    if any(name.startswith(_SECOND_EMBEDDER) for name in shapes):
        raise StateDictError(
            f"{file}: has a second time embedder ({_SECOND_EMBEDDER}*): not MMAudio's network but "
            "one that export_torch wrote; give init_from the run itself"
        )
    try:
        width, latent_dim, _ = shapes["audio_input_proj.0.weight"]
        depth = {
            kind: len({n.split(".")[1] for n in shapes if n.startswith(kind)})
            for kind in ("joint_blocks.", "fused_blocks.")
        }
    except (KeyError, ValueError):
        few = ", ".join(sorted(shapes)[:3])
        raise StateDictError(f"{file}: not MMAudio's network (it holds {few}, ...)") from None
    sizes = width, latent_dim, *depth.values()
    known = {
        name: (c.hidden_dim, c.latent_dim, c.joint_depth, c.fused_depth)
        for name, c in MODELS.items()
    }
    names = [name for name in known if known[name] == sizes]
    if not names:
        raise StateDictError(
            f"{file}: width {sizes[0]}, {sizes[1]} latent channels, {sizes[2]} joint and "
            f"{sizes[3]} fused blocks are no known model's ({', '.join(MODELS)})"
        )
    return names[0]


@flax.struct.dataclass
class _Weights:
    """The part of a run's checkpoint that weights are read from; see `TrainState`.

    The one average has width 0: the weights themselves.
    """

    step: int
    stats: dict
    ema: dict


def add_arguments(parser) -> None:
    parser.add_argument("file", help="MMAudio's weights, e.g. mmaudio_small_16k.pth")
    parser.add_argument("--out", required=True, help="folder to write, for --config.init_from")


def run(args) -> None:
    """Convert; nothing is written before everything fits."""
    if (Path(args.out) / "checkpoints").exists():
        raise ValueError(f"{args.out}: holds checkpoints already; name another folder")
    state_dict = read_state_dict(args.file)
    name = recognise(state_dict, args.file)
    variables = network_from_mmaudio(state_dict, MODELS[name])
    weights = _Weights(step=0, stats=variables["stats"], ema={"0": variables["params"]})
    with checkpoint.open_manager(args.out) as manager:
        checkpoint.save(manager, weights, {"source": Path(args.file).name, "model": name})
    print(f"{args.out}: {name}, to start from with --config.init_from={args.out}")

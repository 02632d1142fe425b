"""MMAudio's state-dict names and layouts <-> our variables.

Names and layouts only: no time reversal, no sign (`import_torch` has those). Arrays are numpy on
both sides; PyTorch is not needed. The rule: a number in a torch name is the index in a
`Sequential` or a `ModuleList` and is joined to what precedes it (`t_embed.mlp.0.weight` is
`t_embed / mlp_0 / kernel`); linear weights `(out, in)` are transposed, convolutions
`(out, in, k)` become `(k, in, out)`, and the rows of a `qkv` layer, `(h dh + d) 3 + j`, become
`j, h, d` (q, k, v is the fastest index there).
"""

import re

import jax
import numpy as np
from flax import traverse_util

from vcm_jax.interop.state_dict import check_names, list_few
from vcm_jax.models import MMDiT, ModelConfig, adapter
from vcm_jax.models.conditioned import zero_inputs

# What is not a layer: torch name -> (collection, our name, leading axes of size 1 in torch).
_SPECIAL = {
    "sync_pos_emb": ("params", "sync_pos_emb", 2),
    "empty_clip_feat": ("params", "empty_clip_feat", 1),
    "empty_sync_feat": ("params", "empty_sync_feat", 1),
    "latent_mean": ("stats", "latent_mean", 2),
    "latent_std": ("stats", "latent_std", 2),
    "empty_string_feat": ("stats", "empty_text", 0),
}


def abstract_variables(config: ModelConfig) -> dict:
    """Shapes and dtypes of the network's variables, without computing any."""
    return jax.eval_shape(MMDiT(config).init, jax.random.key(0), *zero_inputs(config))


def _torch_name(path: tuple[str, ...]) -> str:
    """The torch name of the variable at `path` (collection first)."""
    for name, (collection, ours, _) in _SPECIAL.items():
        if path == (collection, ours):
            return name
    *modules, leaf = path[1:]
    modules = [re.sub(r"_(\d+)$", r".\1", module) for module in modules]
    return ".".join([*modules, "bias" if leaf == "bias" else "weight"])


def _to_torch_layout(path, value):
    if path[-1] in (ours for _, ours, _ in _SPECIAL.values()):
        ones = _SPECIAL[_torch_name(path)][2]
        return value.reshape((1,) * ones + value.shape)
    if path[-2] == "qkv":  # ([D,] 3, H, dh) -> (H dh 3 [, D])
        value = np.moveaxis(value, -3, -1)
        return value.reshape(*value.shape[:-3], -1).T
    return value.T


def _from_torch_layout(path, shape, tensor):
    if path[-2] == "qkv":
        tensor = tensor.T.reshape(*shape[:-3], *shape[-2:], 3)
        return np.moveaxis(tensor, -1, -3)
    return tensor.T if path[-1] == "kernel" else tensor.reshape(shape)


def torch_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the state dict of a network: MMAudio's, plus `h_embed.*`."""
    paths = traverse_util.flatten_dict(abstract_variables(config))
    layout = lambda path: _to_torch_layout(path, np.broadcast_to(np.float32(0), paths[path].shape))
    return {_torch_name(path): layout(path).shape for path in paths}


def variables_from_torch(state_dict: dict, config: ModelConfig) -> dict:
    """The network's variables from a state dict of numpy arrays; `h_embed.*` must be there.

    Returns:
      `{"params": ..., "stats": ...}`, arrays in the state dict's dtypes.

    Raises:
      ValueError: on missing or extra names, or other shapes; names the first few of each.
    """
    paths = traverse_util.flatten_dict(abstract_variables(config))
    check_names(
        {name: np.shape(value) for name, value in state_dict.items()},
        torch_shapes(config),
        "the state dict",
    )
    flat = {
        path: np.ascontiguousarray(
            _from_torch_layout(path, leaf.shape, np.asarray(state_dict[_torch_name(path)]))
        )
        for path, leaf in paths.items()
    }
    return traverse_util.unflatten_dict(flat)


def variables_to_torch(variables: dict, config: ModelConfig) -> dict[str, np.ndarray]:
    """The state dict, numpy arrays under MMAudio's names plus `h_embed.*`; the inverse.

    Raises:
      ValueError: when the variables are not those of `config`.
    """
    flat = traverse_util.flatten_dict(dict(variables))
    paths = traverse_util.flatten_dict(abstract_variables(config))
    shapes = lambda tree: {path: np.shape(value) for path, value in tree.items()}
    if shapes(flat) != shapes(paths):
        wrong = [
            path
            for path in flat.keys() | paths.keys()
            if shapes(flat).get(path) != shapes(paths).get(path)
        ]
        raise ValueError("variables are not the model's: " + list_few(map("/".join, wrong)))
    return {
        _torch_name(path): np.ascontiguousarray(_to_torch_layout(path, np.asarray(value)))
        for path, value in flat.items()
    }


def trained_to_torch(trained: dict) -> dict[str, np.ndarray]:
    """What a run with frozen parameters or an adapter has trained, under MMAudio's names.

    An adapter of the layer `NAME.weight` is `NAME.lora_A.weight`, `R I` or for convolutions
    `R I k`, and `NAME.lora_B.weight`, `O R` or `O R 1`. The weight becomes W + scale B A, where for
    convolutions B A is the composition of the convolution A with B at each position.

    Args:
      trained: nested dictionaries, as `averages.restore_weights` returns them.
    """
    found = {}
    for path, value in traverse_util.flatten_dict(dict(trained)).items():
        path, value = ("params", *path), np.asarray(value)
        name, leaf = _torch_name(path), path[-1]
        if leaf not in (adapter.A, adapter.B):
            found[name] = _to_torch_layout(path, value)
            continue
        layer, is_qkv = name.removesuffix("weight"), path[-2] == "qkv"
        is_conv = np.ndim(_sibling(trained, path[1:-1])) == 3
        if leaf == adapter.A:
            found[f"{layer}lora_A.weight"] = value.T
        elif is_qkv:
            found[f"{layer}lora_B.weight"] = _to_torch_layout(path, value)
        else:
            found[f"{layer}lora_B.weight"] = value.T[..., None] if is_conv else value.T
    return {name: np.ascontiguousarray(value) for name, value in found.items()}


def _sibling(tree: dict, module: tuple[str, ...]):
    """A of the adapter of a module."""
    for name in module:
        tree = tree[name]
    return tree[adapter.A]

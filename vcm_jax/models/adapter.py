"""Low-rank adapters (LoRA, Hu et al. 2021) of the network's linear layers and convolutions.

A kernel W becomes W + scale A B. A keeps all input axes of W and ends in `rank`, B begins with
`rank` and keeps the output axes:

    linear          I O         A  I R       B  R O
    convolution     k I O       A  k I R     B  R O
    q, k and v      D 3 H dh    A  D R       B  R 3 H dh

Adapters lie in the tree of the parameters beside the kernels that they change, as `lora_a` and
`lora_b`. They are merged before the network is applied, so that neither the network nor an
objective knows of them. B is zero at first: the network then is the one without an adapter.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import traverse_util

from vcm_jax.settings import check, integer, number, patterns, setting

A, B = "lora_a", "lora_b"


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Settings of an adapter.

    Attributes:
      rank: R; 0 is no adapter.
      scale: factor of A B, which other programs call alpha / rank.
      patterns: which layers have an adapter (`vcm_jax.training.selection` explains patterns).

    Raises:
      ValueError: when a setting is out of its range.
    """

    rank: int = setting(0, integer(0))
    scale: float = setting(1.0, number(above=0))
    patterns: tuple[str, ...] = setting(("*",), patterns(least=1))

    def __post_init__(self):
        check(self, "adapter")


def _input_axes(path: tuple[str, ...], ndim: int) -> int:
    """How many leading axes of a kernel are inputs."""
    return 1 if path[-2] == "qkv" else ndim - 1


def is_adaptable(path: tuple[str, ...]) -> bool:
    """Whether a parameter is the kernel of a linear layer or of a convolution."""
    return path[-1] == "kernel"


def adapter_paths(path: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Paths of A and B of the kernel at `path`."""
    return (*path[:-1], A), (*path[:-1], B)


def init_adapter(key, path: tuple[str, ...], shape: tuple[int, ...], rank: int) -> dict:
    """{path: array} of A and B of one kernel, float32.

    A is uniform in +-1 / sqrt(inputs), B is zero (as in the authors' code).

    Args:
      key: of A.
      path, shape: of the kernel.
      rank: R.
    """
    inputs = _input_axes(path, len(shape))
    fan_in = 1
    for size in shape[:inputs]:
        fan_in *= size
    bound = fan_in**-0.5
    a = jax.random.uniform(key, (*shape[:inputs], rank), jnp.float32, -bound, bound)
    return dict(zip(adapter_paths(path), (a, jnp.zeros((rank, *shape[inputs:]), jnp.float32))))


def merge(kernel, a, b, scale: float):
    """W + scale A B, in the dtype of W; the sum is at least float32."""
    wide = jnp.promote_types(jnp.float32, kernel.dtype)
    return (kernel.astype(wide) + scale * jnp.tensordot(a, b, 1)).astype(kernel.dtype)


def complete(trained: dict, frozen: dict, scale: float) -> dict:
    """The network's parameters from what is trained and what is frozen.

    Args:
      trained: parameters, adapters, or both; nested dictionaries, as the network's.
      frozen: all other parameters, among them the kernels that have an adapter.
      scale: of the adapters.
    """
    trained, whole = (traverse_util.flatten_dict(dict(tree)) for tree in (trained, frozen))
    for path, value in trained.items():
        if path[-1] not in (A, B):
            whole[path] = value
        elif path[-1] == A:
            kernel = (*path[:-1], "kernel")
            whole[kernel] = merge(whole[kernel], value, trained[(*path[:-1], B)], scale)
    return traverse_util.unflatten_dict(whole)

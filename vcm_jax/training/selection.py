"""Which parameters a run trains: all of them, some by patterns of their names, or an adapter.

A pattern is a shell pattern over the names of parameters, such as
`fused_blocks_7/attn/qkv/kernel`. `*` also matches `/`. A pattern that matches a module means all of
its parameters: `h_embed`, `fused_blocks_[67]`, `*/attn`.
"""

import dataclasses
import difflib
import fnmatch
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from flax import traverse_util

from vcm_jax.models import MMDiT, adapter
from vcm_jax.models.adapter import AdapterConfig
from vcm_jax.models.conditioned import zero_inputs


def matching(names: Iterable[str], patterns: Iterable[str], setting: str) -> set[str]:
    """The names that match at least one pattern.

    Args:
      names: of parameters, their paths joined by "/".
      patterns: see the top of this file.
      setting: what the patterns are called in an error.

    Raises:
      ValueError: a pattern matches nothing; the line names the nearest modules and parameters.
    """
    names, found = list(names), set()
    for pattern in patterns:
        matched = {
            name
            for name in names
            if fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}/*")
        }
        if not matched:
            near = ", ".join(_nearest(pattern, names))
            raise ValueError(f"{setting}: {pattern!r} matches no parameter; the nearest are {near}")
        found |= matched
    return found


def _nearest(pattern: str, names: list[str], count: int = 3) -> list[str]:
    """Names of modules and parameters, the most similar to a pattern first."""
    parts = [name.split("/") for name in names]
    every = {"/".join(path[:length]) for path in parts for length in range(1, len(path) + 1)}
    plain = pattern.replace("*", "").strip("/")
    return difflib.get_close_matches(plain, sorted(every), count, cutoff=0.0)


@dataclasses.dataclass(frozen=True)
class Selection:
    """What of the network's parameters is trained; static in a compiled step.

    Attributes:
      trained: paths of the parameters that are trained themselves; None for all.
      adapted: paths of the kernels that have an adapter, which is trained.
      adapter: settings of the adapter.
      dtype: of the network. Frozen kernels are held in it, since the network computes with them in
        no other one.
    """

    trained: frozenset[tuple[str, ...]] | None = None
    adapted: frozenset[tuple[str, ...]] = frozenset()
    adapter: AdapterConfig = AdapterConfig()
    dtype: str = "float32"

    @property
    def is_whole(self) -> bool:
        """Whether all parameters are trained, and there is no adapter."""
        return self.trained is None

    def split(self, params: dict, key=None):
        """(what is trained, what is frozen), two trees, from the network's parameters.

        Args:
          params: nested dictionaries.
          key: of the adapter's random numbers.

        Returns:
          For a run that trains everything (params, None).
        """
        if self.is_whole:
            return params, None
        flat = traverse_util.flatten_dict(dict(params))
        trained = {path: value for path, value in flat.items() if path in self.trained}
        adapted = sorted(self.adapted)
        for path, k in zip(adapted, jax.random.split(key, max(len(adapted), 1))):
            trained |= adapter.init_adapter(k, path, flat[path].shape, self.adapter.rank)
        return traverse_util.unflatten_dict(trained), self._frozen(flat)

    def frozen(self, params: dict) -> dict | None:
        """What is frozen alone, as `split` returns it."""
        return None if self.is_whole else self._frozen(traverse_util.flatten_dict(dict(params)))

    def _frozen(self, flat: dict) -> dict:
        return traverse_util.unflatten_dict(
            {
                path: value.astype(jnp.dtype(self.dtype)) if path[-1] == "kernel" else value
                for path, value in flat.items()
                if path not in self.trained
            }
        )

    def complete(self, trained: dict, frozen: dict | None) -> dict:
        """The network's parameters, with the adapter merged into them."""
        return trained if self.is_whole else adapter.complete(trained, frozen, self.adapter.scale)


ALL = Selection()


def select(
    net: MMDiT, train_only: Iterable[str], freeze: Iterable[str], config: AdapterConfig
) -> Selection:
    """What a run trains, from its settings.

    Without an adapter that is what matches `train_only` (everything if it is empty) and does not
    match `freeze`. With an adapter it is the adapter, and what matches `train_only` beside it.

    Args:
      net: the network.
      train_only, freeze: patterns.
      config: of the adapter.

    Raises:
      ValueError: a pattern that matches nothing, or nothing to train.
    """
    train_only, freeze = tuple(train_only), tuple(freeze)
    if not (train_only or freeze or config.rank):
        return ALL
    shapes = jax.eval_shape(net.init, jax.random.key(0), *zero_inputs(net.config))["params"]
    paths = {"/".join(path): path for path in traverse_util.flatten_dict(shapes)}
    trained = matching(paths, train_only, "optimizer.train_only")
    if not train_only and not config.rank:
        trained = set(paths)
    unwanted = matching(paths, freeze, "optimizer.freeze")
    trained -= unwanted
    adapted = set()
    if config.rank:
        kernels = [name for name, path in paths.items() if adapter.is_adaptable(path)]
        adapted = matching(kernels, config.patterns, "adapter.patterns") - trained - unwanted
    if not (trained or adapted):
        raise ValueError(
            "optimizer.train_only, optimizer.freeze and adapter.patterns leave nothing to train"
        )
    as_paths = lambda names: frozenset(paths[name] for name in names)
    dtype = jnp.dtype(net.dtype).name
    return Selection(as_paths(trained), as_paths(adapted), config, dtype)

"""The values that the settings of a config accept, checked once, before a run is set up.

Settings of the objective, the optimizer and the network declare their ranges with their classes
(`vcm_jax.settings`); this table holds all others.
"""

from collections.abc import Mapping

from vcm_jax.ema import gamma_from_sigma_rel
from vcm_jax.models import MODELS
from vcm_jax.models.layers import ATTENTION
from vcm_jax.models.mmdit import REMAT
from vcm_jax.settings import BOOLEAN, TEXT, Range, choice, integer

_LARGEST = 2**31 - 1  # step numbers and seeds have 32 bits
OF_START = "init_from"  # the model whose sizes are those of the weights that training starts from
_count, _at_least_one = integer(0, _LARGEST), integer(1, _LARGEST)
_size = Range("an integer >= 1, or -1", lambda value: value == -1 or integer(1).holds(value))


def _are_sources(value) -> bool:
    return isinstance(value, tuple | list) and all(map(TEXT.holds, value))


def _are_step_counts(value) -> bool:
    return isinstance(value, tuple | list) and all(map(_at_least_one.holds, value))


def _is_width(value) -> bool:
    try:
        gamma_from_sigma_rel(value)
    except (TypeError, ValueError):
        return False
    return not isinstance(value, bool)


def _are_widths(value) -> bool:
    if not isinstance(value, tuple | list) or not value or not all(map(_is_width, value)):
        return False
    return len({f"{width:g}" for width in value}) == len(value)  # checkpoints name them like this


_SOURCES = Range("a tuple of 'PATH=WEIGHT' strings", _are_sources)

# {dotted key: accepted values}. Where 0 is accepted for `..._every`, it means never.
RANGES = {
    "accumulate": _at_least_one,
    "allow_config_change": BOOLEAN,
    "attention": choice("auto", *ATTENTION),
    "batch_size": _at_least_one,
    "checkpoint_every": _at_least_one,
    "data.dir": TEXT,
    "data.num_workers": integer(0, 1024),
    "data.sources": _SOURCES,
    "data.val_sources": _SOURCES,
    "dtype": choice("float32", "bfloat16"),
    "ema_sigma_rels": Range(
        f"a tuple of different numbers between 0 and {12**-0.5:.4f}, at least one", _are_widths
    ),
    "eval_batches": _at_least_one,
    "eval_clips": _at_least_one,
    "eval_every": _count,
    "eval_sample_steps": Range("a tuple of integers >= 1, which may be empty", _are_step_counts),
    "init_from": TEXT,
    "keep_every": _count,
    "log_every": _at_least_one,
    "mesh.data": _size,
    "mesh.fsdp": _size,
    "mesh.tensor": _size,
    "model": choice(*MODELS, OF_START),
    "on_nonfinite": choice("stop", "skip"),
    "profile": TEXT,
    "remat": choice(*REMAT),
    "sample_clips": _count,
    "sample_every": _count,
    "scan_blocks": Range(
        "True, False, or None for the default", lambda value: value in (True, False, None)
    ),
    "seed": _count,
    "snapshot_every": _count,
    "steps": _at_least_one,
    "topology": TEXT,
}
# Sections whose settings are checked by the classes that they are read into.
SECTIONS = ("adapter", "model_overrides", "objective", "optimizer")


def _flatten(config: Mapping, prefix: str = ""):
    for key, value in config.items():
        if not prefix and key in SECTIONS:
            continue
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def check(config: Mapping) -> None:
    """Checks a config, as nested dictionaries.

    Raises:
      ValueError: a setting is missing, unknown, or out of its range; one line that names it.
    """
    for section in SECTIONS:
        if not isinstance(config.get(section), Mapping):
            raise ValueError(f"config.{section} must be a section of settings")
    found = dict(_flatten(config))
    for what, keys in (("no", RANGES.keys() - found), ("an unknown", found.keys() - RANGES)):
        if keys:
            raise ValueError(f"the config has {what} setting {', '.join(sorted(keys))}")
    for key, accepts in RANGES.items():
        if not accepts.holds(found[key]):
            raise ValueError(f"config.{key} must be {accepts.text}, not {found[key]!r}")

"""Which settings may change when a run is resumed."""

import dataclasses
from collections.abc import Mapping

from vcm_jax.objectives import OBJECTIVES, Objective

# How the work is done and watched. These do not change what is computed, except for rounding.
FREE = (
    "accumulate", "allow_config_change", "attention", "checkpoint_every", "data.dir",
    "data.num_workers", "data.val_sources", "eval_batches", "eval_clips", "eval_every",
    "eval_sample_steps", "keep_every", "log_every", "mesh", "on_nonfinite", "profile", "remat",
    "sample_clips", "sample_every", "scan_blocks", "snapshot_every", "topology",
)  # fmt: skip
# The state, the order of the data and the snapshots depend on these: a change makes another run.
FIXED = (
    "adapter",
    "batch_size",
    "ema_sigma_rels",
    "model",
    "model_overrides",
    "objective",
    "optimizer.freeze",
    "optimizer.moments",
    "optimizer.train_only",
    "records",
    "seed",
)
# Settings that runs of earlier versions do not have, with the values that they were trained with.
NEWER = {
    "adapter": {"rank": 0, "scale": 1.0, "patterns": ["*"]},
    "model_overrides": {"blocks_at_s": None},
    "optimizer": {"moments": "float32", "train_only": [], "freeze": []},
}


class ResumeError(ValueError):
    """The run cannot be resumed with its present settings; one line that says what changed."""


def changes(before: Mapping, now: Mapping, prefix: str = "") -> dict[str, str]:
    """The differences between two nested configs: {dotted key: "is ..., was ..."}."""
    found = {}
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found |= changes(old, new, f"{prefix}{key}.")
        elif old != new:
            found[prefix + key] = f"is {new!r}, was {old!r}"
    return found


def _of(key: str, group: tuple[str, ...]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in group)


def _with_newer(config: Mapping) -> dict:
    """A config with the settings that its version of the program did not have.

    Their defaults leave an objective as it was before it had them.
    """
    known = OBJECTIVES.get(config["objective"].get("name"), Objective)
    defaults = {field.name: field.default for field in dataclasses.fields(known)}
    # Lists, as in JSON.
    defaults = {key: list(v) if isinstance(v, tuple) else v for key, v in defaults.items()}
    defaults |= {"anneal_steps": 0, "dispersive": 0.0}
    newer = NEWER | {"objective": defaults}
    return {**config, **{name: newer[name] | dict(config.get(name, {})) for name in newer}}


def describe(config: Mapping, texts, sources, base: Mapping | None = None) -> dict:
    """What a checkpoint says about its run, as JSON.

    Args:
      config: nested dictionaries.
      texts: the 'PATH=WEIGHT' strings of the data sources.
      sources: the RecordSource of each of them.
      base: {place, hash} of the weights below what is trained, if some are frozen.
    """
    first = sources[0].manifest
    return ({"base": dict(base)} if base else {}) | {
        "config": dict(config),
        "records": {
            "codec": first.codec,
            "encoders": first.encoders,
            "sequence": dataclasses.asdict(first.sequence),
        },
        "sources": {
            text: {"records": len(source), "fingerprint": source.manifest.fingerprint}
            for text, source in zip(texts, sources)
        },
    }


def _check_base(saved: Mapping | None, now: Mapping | None) -> None:
    if saved and now and saved["hash"] != now["hash"]:
        raise ResumeError(
            f"what this workdir holds was trained on top of {saved['place']} ({saved['hash']}), "
            f"but config.init_from is {now['place']} ({now['hash']}): its weights are others"
        )


def check(saved: Mapping, now: Mapping, allow: bool) -> list[str]:
    """Compares the meta of a checkpoint with that of the run that would resume from it.

    Args:
      saved, now: from `describe`.
      allow: whether data sources, and keys that are neither `FREE` nor `FIXED`, may differ. More
        steps need no permission.

    Returns:
      One line for every difference, for the log.

    Raises:
      ResumeError: something differs that must not.
    """
    _check_base(saved.get("base"), now.get("base"))
    config = changes(_with_newer(saved["config"]), _with_newer(now["config"]))
    lines = {key: f"config.{key} {change}" for key, change in config.items()}
    records = changes(saved.get("records", now["records"]), now["records"])
    lines |= {f"records.{key}": f"records' {key} {change}" for key, change in records.items()}
    free = FREE
    if now["config"]["steps"] > saved["config"]["steps"]:
        free += ("steps",)  # what was computed stays as it is
    refused = {key: line for key, line in lines.items() if not _of(key, free)}
    for text, source in now["sources"].items():
        if (before := saved.get("sources", {}).get(text, source)) != source:
            refused[text] = lines[text] = (
                f"data source {text} changed since the checkpoint: {source['records']} records "
                f"({source['fingerprint'][:8]}), was {before['records']} "
                f"({before['fingerprint'][:8]})"
            )
    fixed = [line for key, line in refused.items() if _of(key, FIXED)]
    if fixed:
        raise ResumeError(
            f"this workdir holds another run: {'; '.join(fixed)}. Give another --workdir "
            "(config.init_from starts it from this run's weights)"
        )
    if refused and not allow:
        raise ResumeError(
            f"this run was started with other settings: {'; '.join(refused.values())}. "
            "--config.allow_config_change resumes it with the new ones"
        )
    return list(lines.values())

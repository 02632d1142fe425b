"""Whole weights of a run, of imported or of public weights: adapters are merged with their base."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np

from vcm_jax import pretrained
from vcm_jax.hashes import short_hash
from vcm_jax.models import MODELS, MMDiT, ModelConfig, adapter
from vcm_jax.models.conditioned import zero_inputs
from vcm_jax.models.mmdit import GUIDANCE_INPUT
from vcm_jax.runs import averages, checkpoint, description
from vcm_jax.runs.fingerprints import fingerprints


@dataclasses.dataclass(frozen=True)
class Base:
    """The weights that a run with frozen parameters or an adapter belongs to.

    Attributes:
      place: name of public weights, or an absolute path.
      hash: `hash_params` of its parameters.
    """

    place: str
    hash: str


def hash_params(params) -> str:
    """16 hexadecimal digits that depend on every bit of the parameters."""
    return short_hash(json.dumps(fingerprints(params), sort_keys=True).encode())


def place_of(name_or_folder: str) -> str:
    """The name of public weights as it is; a path, absolute."""
    if name_or_folder in pretrained.PUBLIC_MODELS:
        return name_or_folder
    return str(Path(name_or_folder).expanduser().absolute())


def read(name_or_folder: str) -> dict:
    """Whole weights that training can start from, on the host.

    Args:
      name_or_folder: of public weights; or the workdir of a run, or a folder of imported weights.

    Returns:
      {"params": float32 arrays, "stats": what of the statistics is known}.

    Raises:
      CheckpointError: there is nothing of this kind, or it is damaged.
      PretrainedError: public weights that cannot be fetched, or are damaged.
    """
    if pretrained.is_public(name_or_folder):
        found = pretrained.read_network(pretrained.load_network(name_or_folder))
    else:
        found = read_run(name_or_folder)
    wide = lambda a: np.asarray(a, np.float32)
    return found | {"params": jax.tree.map(wide, found["params"])}


def read_run(workdir, step: int | None = None, sigma_rel: float | None = None) -> dict:
    """The EMA weights of a run, whole: as `averages.restore_weights`, with the base added.

    Args:
      workdir: of the run, or a folder of imported weights, which have no base.
      step, sigma_rel: as `averages.restore_weights`'s.

    Raises:
      CheckpointError: as `averages.restore_weights`; or the base is not there, or is another one.
    """
    found = averages.restore_weights(workdir, step, sigma_rel)
    described = description.read(workdir) if description.is_run(workdir) else None
    if described is None or described.base is None:
        return found
    frozen = _read_base(Base(**described.base), workdir)
    scale = described.config["adapter"]["scale"]
    return found | {"params": adapter.complete(found["params"], frozen, scale)}


def _read_base(base: Base, workdir) -> dict:
    """The parameters of the base of a run, float32.

    It may have moved to WORKDIR/base, which may be a link.

    Raises:
      CheckpointError: it is not there, or it is another one.
    """
    moved = Path(workdir) / "base"
    place = str(moved) if moved.exists() else base.place
    what = f"{workdir} holds what was trained on top of {place}"
    try:
        params = read(place)["params"]
    except ValueError as error:
        raise checkpoint.CheckpointError(
            f"{what}, which cannot be read ({error}): link it as {moved}"
        ) from error
    if (found := hash_params(params)) != base.hash:
        raise checkpoint.CheckpointError(
            f"{what}, but the weights there are others by now: their hash is {found}, that of the "
            f"base {base.hash}"
        )
    return params


def check_sizes(params, model: ModelConfig, what: str) -> None:
    """Raises CheckpointError, beginning with `what`, if parameters are not those of a network."""
    wanted = jax.eval_shape(MMDiT(model).init, jax.random.key(0), *zero_inputs(model))["params"]
    if GUIDANCE_INPUT not in params:  # it starts as one that has no effect
        wanted = {name: value for name, value in wanted.items() if name != GUIDANCE_INPUT}
    try:
        checkpoint.check_shapes(params, wanted, what)
    except checkpoint.CheckpointError as error:
        theirs = _sizes(params)
        differing = {name: size for name, size in theirs.items() if getattr(model, name) != size}
        if not differing:
            raise
        shown = ", ".join(f"{n} {size}, not {getattr(model, n)}" for n, size in differing.items())
        fitting = [
            name
            for name, known in MODELS.items()
            if all(getattr(known, key) == size for key, size in theirs.items())
        ]
        hint = f" (--config.model={' or '.join(fitting)} has its sizes)" if fitting else ""
        raise checkpoint.CheckpointError(f"{what} is of another size: {shown}{hint}") from error


def _sizes(params) -> dict[str, int]:
    """Sizes of the network that can be read from the names and shapes of its parameters."""

    def count(kind):
        return sum(name.startswith(kind) for name in params)

    shape = lambda module: np.shape(params.get(module, {}).get("kernel", np.zeros((0, 0))))
    latent_dim, hidden_dim = shape("audio_input_proj_0")[-2:]
    return {
        "latent_dim": latent_dim,
        "hidden_dim": hidden_dim,
        "depth": count("joint_blocks_") + count("fused_blocks_"),
        "fused_depth": count("fused_blocks_"),
        "version": 2 if "clip_input_proj_2" in params else 1,
    }


def model_of(name_or_folder: str) -> ModelConfig:
    """The sizes of the network whose weights `read` would return.

    Raises:
      ValueError: nothing says what the sizes are.
    """
    if pretrained.is_public(name_or_folder):
        return MODELS[pretrained.resolve(name_or_folder).public.model]
    if description.is_run(name_or_folder):
        return description.read(name_or_folder).model
    name = averages.imported_model(name_or_folder)
    if name not in MODELS:
        raise ValueError(
            f"{name_or_folder}: neither a public model, nor the workdir of a run, nor imported "
            "weights (vcm_jax.interop.import_torch)"
        )
    return MODELS[name]

"""A trained run or public weights: generation, comparison and export start from it."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp

from vcm_jax import pretrained, sampling, weights
from vcm_jax.codec import check_codec, load_codec
from vcm_jax.features.encoders import encoders_from_spec, load_encoders
from vcm_jax.generation.windows import Windowing
from vcm_jax.models import MODELS, ModelConfig
from vcm_jax.objectives import read_section
from vcm_jax.objectives.flow_matching import FlowMatchingConfig
from vcm_jax.records.sequence import SequenceConfig
from vcm_jax.runs import description

FLOW_MATCHING_STEPS = 25  # MMAudio's


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained run or public weights, ready to generate.

    Attributes:
      model: sizes of the network, at the duration of training.
      variables: EMA weights and statistics. The network computes in the dtype of its weights.
      sequence: lengths of the features, at the duration of training.
      encoder_spec: which encoders made the features in training; None if nobody has noted it.
      encoders: turn videos and captions into features; None in a run that was loaded without them.
      codec: turns latents into sound.
      objective: settings of the objective that the run was trained with.
      sampler: how the run is sampled; by default the objective's own way.
      windowing: how clips longer than those of training are divided.
      steps: how many steps the sampler takes unless something else is asked for.
      loaders: {attribute: function that loads it} of what is in memory only inside of `stage`:
        variables, encoders or codec.

    Raises:
      ValueError: the sampler does not fit the objective.
    """

    model: ModelConfig
    variables: dict
    sequence: SequenceConfig
    encoder_spec: dict
    encoders: object | None
    codec: object
    objective: object
    sampler: sampling.Sampler = sampling.OWN_SAMPLER
    windowing: Windowing = Windowing()
    steps: int = 1
    loaders: Mapping[str, Callable] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        self.sampler.check(self.objective)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator["Run"]:
        """The run with its attribute `name` loaded, for as long as the block takes.

        Where nothing is loaded in stages this is the run itself. The block must not keep what it is
        given, so that the memory is free when it ends.
        """
        if name not in self.loaders:
            yield self
            return
        loaded = self.loaders[name]()
        try:
            yield dataclasses.replace(self, **{name: loaded})
        finally:
            if hasattr(loaded, "release"):
                loaded.release()


def load(
    workdir,
    model,
    codec_folder=None,
    encoder_folder=None,
    dtype: str | None = None,
    step: int | None = None,
    sigma_rel: float | None = None,
    with_encoders: bool = True,
) -> Run:
    """A trained run or public weights, whichever is given: `load_run` or `load_public`.

    Args:
      workdir: of a run; None for public weights.
      model: name or folder of public weights.
      dtype: float32 or bfloat16; None for float32 on CPUs and bfloat16 elsewhere.
      codec_folder, encoder_folder, step, sigma_rel, with_encoders: as `load_run`'s; the last three
        are for runs.
    """
    # The encoders' PyTorch shares the device, whose memory JAX would keep to itself.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    if model:
        return load_public(model, codec_folder, encoder_folder, dtype)
    return load_run(workdir, step, sigma_rel, codec_folder, encoder_folder, with_encoders, dtype)


def load_run(
    workdir,
    step: int | None = None,
    sigma_rel: float | None = None,
    codec_folder=None,
    encoder_folder=None,
    with_encoders: bool = True,
    dtype: str = "float32",
) -> Run:
    """Reads a workdir of `vcm_jax.main`.

    Args:
      workdir: of the run.
      step: training step of the checkpoint; None for the latest.
      sigma_rel: relative width of the EMA weights; None for the run's first.
      codec_folder: the codec to use instead of the run's own, for example with another vocoder.
      encoder_folder: weights of CLIP and Synchformer, if they made the features of this run.
      with_encoders: False if the features exist already.
      dtype: of the network and the codec, float32 or bfloat16.

    Raises:
      ValueError: the folder is not a workdir, has no such step or width, or the codec or the
        encoders are not those of this run.
    """
    workdir, described = Path(workdir), description.read(workdir)
    codec_folder = codec_folder or workdir / "codec"
    codec = load_codec(codec_folder, dtype)
    try:
        check_codec(codec, described.sequence)
        # Latents are alike if the encoders are, whatever decodes them.
        for key, value in described.codec.items():
            if key == "name":
                continue
            if getattr(codec, key) != value:
                raise ValueError(
                    f"its {key} is {getattr(codec, key)}, that of the training data {value}"
                )
    except ValueError as error:
        raise ValueError(f"{codec_folder} does not fit the run {workdir}: {error}") from None
    encoders = encoders_from_spec(described.encoders, encoder_folder) if with_encoders else None
    variables = weights.read_run(workdir, step, sigma_rel)
    cast = functools.partial(jax.tree.map, lambda a: a.astype(jnp.dtype(dtype)))
    objective = read_section(described.config["objective"])[0]
    return Run(
        model=described.model,
        variables=variables | {"params": cast(variables["params"])},
        sequence=described.sequence,
        encoder_spec=described.encoders,
        encoders=encoders,
        codec=codec,
        objective=objective,
        steps=FLOW_MATCHING_STEPS if objective.instant_only else 1,
    )


def load_public(
    name_or_folder, codec_folder=None, encoder_folder=None, dtype: str = "float32"
) -> Run:
    """Public weights by name, or from a folder of their files; see `pretrained.load`.

    Encoders, network and codec are loaded by `Run.stage`: they need not fit into memory together.

    Args:
      name_or_folder: of the weights; what is missing is fetched and converted first.
      codec_folder, encoder_folder: used instead of the published ones.
      dtype: of everything, float32 or bfloat16.

    Raises:
      ValueError: no such weights, files that are missing or damaged, or a codec of another kind.
      OSError: the disk is full or cannot be written.
    """
    found = pretrained.load(name_or_folder)
    codec_folder = codec_folder or found.codec
    codec, model = load_codec(codec_folder, dtype), MODELS[found.model]  # reads no weights yet
    check_codec(codec, found.sequence)
    if codec.latent_dim != model.latent_dim:
        raise ValueError(f"{codec_folder} has {codec.latent_dim} channels, not {model.latent_dim}")
    return Run(
        model=model,
        variables=None,
        sequence=found.sequence,
        encoder_spec=None,
        encoders=None,
        codec=codec,
        objective=FlowMatchingConfig(guidance_scale=found.guidance_scale),
        steps=found.steps,
        loaders={
            "encoders": functools.partial(load_encoders, encoder_folder or found.encoders, dtype),
            "variables": functools.partial(_network_on_device, found.network, dtype),
            "codec": functools.partial(load_codec, codec_folder, dtype),
        },
    )


def _network_on_device(folder, dtype: str) -> dict:
    """The variables of a converted network, moved array by array: no second copy stays behind."""
    leaves, tree = jax.tree.flatten(pretrained.read_network(folder, jnp.dtype(dtype)))
    for i in range(len(leaves)):
        leaves[i] = jax.device_put(leaves[i])
    return jax.tree.unflatten(tree, leaves)

"""A trained run, read from its workdir: generation, comparison and export start from it."""

import dataclasses
from pathlib import Path

from vcm_jax import sampling
from vcm_jax.codec import check_codec, load_codec
from vcm_jax.features.encoders import encoders_from_spec
from vcm_jax.generation.windows import Windowing
from vcm_jax.models import ModelConfig
from vcm_jax.objectives import read_section
from vcm_jax.records.sequence import SequenceConfig
from vcm_jax.runs import averages, description


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained run, ready to generate.

    Attributes:
      model: sizes of the network, at the duration of training.
      variables: EMA weights and statistics.
      sequence: lengths of the features, at the duration of training.
      encoder_spec: which encoders made the features in training.
      encoders: turn videos and captions into features; None in a run that was loaded without them.
      codec: turns latents into sound.
      objective: settings of the objective that the run was trained with.
      sampler: how the run is sampled; by default the objective's own way.
      windowing: how clips longer than those of training are divided.

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

    def __post_init__(self):
        self.sampler.check(self.objective)


def load_run(
    workdir,
    step: int | None = None,
    sigma_rel: float | None = None,
    codec_folder=None,
    encoder_folder=None,
    with_encoders: bool = True,
) -> Run:
    """Reads a workdir of `vcm_jax.main`.

    Args:
      workdir: of the run.
      step: training step of the checkpoint; None for the latest.
      sigma_rel: relative width of the EMA weights; None for the run's first.
      codec_folder: the codec to use instead of the run's own, for example with another vocoder.
      encoder_folder: weights of CLIP and Synchformer, if they made the features of this run.
      with_encoders: False if the features exist already.

    Raises:
      ValueError: the folder is not a workdir, has no such step or width, or the codec or the
        encoders are not those of this run.
    """
    workdir, described = Path(workdir), description.read(workdir)
    codec_folder = codec_folder or workdir / "codec"
    codec = load_codec(codec_folder)
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
    return Run(
        model=described.model,
        variables=averages.restore_weights(workdir, step, sigma_rel),
        sequence=described.sequence,
        encoder_spec=described.encoders,
        encoders=encoders,
        codec=codec,
        objective=read_section(described.config["objective"])[0],
    )

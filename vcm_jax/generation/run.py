"""A trained run as its workdir holds it: what generating, comparing and exporting start from."""

import dataclasses
from pathlib import Path

from vcm_jax import sampling
from vcm_jax.codec import check_codec, load_codec
from vcm_jax.features.encoders import encoders_from_spec
from vcm_jax.models import ModelConfig
from vcm_jax.objectives import read_section
from vcm_jax.records.sequence import SequenceConfig
from vcm_jax.runs import averages, description


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained run, ready to generate.

    Attributes:
      model: sizes, at the duration of training.
      variables: averaged parameters and statistics.
      sequence: lengths at the duration of training.
      encoder_spec: of what made the features in training.
      encoders, codec: what turns videos and captions into features, and latents into sound;
        encoders are None in a run that was loaded without.
      objective: settings of the objective that it was trained with.
      sampler: how it is sampled, the objective's own way unless another is put in.

    Raises:
      ValueError: when the sampler does not fit the objective.
    """

    model: ModelConfig
    variables: dict
    sequence: SequenceConfig
    encoder_spec: dict
    encoders: object | None
    codec: object
    objective: object
    sampler: sampling.Sampler = sampling.OWN_SAMPLER

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
      step: of the checkpoint, None for the latest.
      sigma_rel: width of the weights' average, None for the run's first.
      codec_folder: the codec to use instead of the run's own, e.g. with another vocoder.
      encoder_folder: weights of CLIP and Synchformer, for a run whose features they made.
      with_encoders: False where the features are there already.

    Raises:
      ValueError: when it is not one, has no such step or average, or the codec or the encoders are
        not those of this run.
    """
    workdir, described = Path(workdir), description.read(workdir)
    codec_folder = codec_folder or workdir / "codec"
    codec = load_codec(codec_folder)
    try:
        check_codec(codec, described.sequence)
        for key, value in described.codec.items():
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

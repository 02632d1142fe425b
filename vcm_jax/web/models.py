"""What the page offers: loaded runs, what they can do, and what is said about them."""

import dataclasses
from pathlib import Path

import jax

from vcm_jax.generation.run import Run, load
from vcm_jax.runs import checkpoint, description
from vcm_jax.sampling import Sampler


@dataclasses.dataclass(frozen=True)
class Guidance:
    """Guidance that a visitor chooses.

    Attributes:
      default: the scale at first; 0 stands for the model's own way.
      lowest, highest: limits of the scale, besides 0 where that is the default.
      info: what the page says about it.
    """

    default: float
    lowest: float
    highest: float
    info: str


@dataclasses.dataclass(frozen=True)
class Capabilities:
    """What a model can do.

    Attributes:
      steps: how many steps its sampler takes unless something else is asked for.
      guidance: what can be chosen.
      negative_prompt: whether there is a sampler that leads away from a prompt.
      sampling: how it is sampled by default, a sentence.
    """

    steps: int
    guidance: Guidance
    negative_prompt: bool
    sampling: str


def capabilities(run: Run) -> Capabilities:
    """What a run can do, as far as the page offers it.

    A negative prompt needs a sampler that evaluates the network twice in each step.
    """
    if run.objective.instant_only:
        scale = run.objective.guidance_scale
        return Capabilities(
            steps=run.steps,
            guidance=Guidance(scale, 1, 10, "1: none. More follows the prompt more closely."),
            negative_prompt=True,
            sampling=f"{run.steps} Euler steps with guidance {scale:g}, "
            "two network evaluations in each",
        )
    jumps = "one jump from noise to sound, one network evaluation; more steps are more jumps"
    if run.objective.guidance_input:
        scale, largest = run.objective.guidance_scale, run.objective.guidance_max
        info = "1: none. An input of this model: one evaluation a step, whatever it is."
        return Capabilities(run.steps, Guidance(scale, 1, largest, info), False, jumps)
    return Capabilities(
        steps=run.steps,
        guidance=Guidance(
            0,
            1,
            10,
            "0: as the model was trained, in one evaluation a step. Otherwise Euler steps with "
            "this guidance, which need two evaluations each and about 25 steps.",
        ),
        negative_prompt=True,
        sampling=jumps,
    )


def sampler(run: Run, guidance: float) -> Sampler:
    """The sampler for a guidance scale; 0 is the model's own way.

    Raises:
      ValueError: the scale is out of the range that the page offers.
    """
    offered = capabilities(run).guidance
    if guidance in (0, offered.default):
        return Sampler()
    if not offered.lowest <= guidance <= offered.highest:
        raise ValueError(f"guidance must be from {offered.lowest:g} to {offered.highest:g}")
    return Sampler(float(guidance))


@dataclasses.dataclass(frozen=True)
class Model:
    """A run, and what the page says about it.

    Attributes:
      name: a short name.
      run: ready to generate.
      facts: what the model is, a sentence.
    """

    name: str
    run: Run
    facts: str

    @property
    def can(self) -> Capabilities:
        return capabilities(self.run)


def resident(run: Run) -> Run:
    """The run with everything in memory that it would otherwise load for each job."""
    loaded = {name: load_it() for name, load_it in run.loaders.items()}
    return dataclasses.replace(run, **loaded, loaders={})


def open_model(
    workdir=None,
    model=None,
    *,
    step: int | None = None,
    keep: bool = True,
    **options,
) -> Model:
    """Loads a trained run, or public weights.

    Args:
      workdir, model: as `generation.run.load`'s.
      step: training step of the checkpoint; None for the latest.
      keep: whether to keep everything in memory.
      options: of `generation.run.load`.

    Raises:
      ValueError: as `generation.run.load`.
    """
    run = load(workdir, model, step=step, **options)
    run = resident(run) if keep else run
    name = Path(workdir or model).name or str(workdir or model)
    parts = []
    if run.variables is not None:
        count = sum(leaf.size for leaf in jax.tree.leaves(run.variables["params"]))
        parts.append(f"{count / 1e6:.3g}M parameters")
    if model:
        parts.append("public weights of others, flow matching")
    else:
        at = checkpoint.latest_step(workdir) if step is None else step
        config = description.read(workdir).config
        parts.append(f"objective {config['objective']['name']}")
        parts.append(f"training step {at:,} (EMA weights)")
    sequence = run.sequence
    parts.append(f"trained on clips of {sequence.duration:g} s")
    parts.append(f"sound at {sequence.sample_rate / 1000:g} kHz")
    return Model(name, run, ", ".join(parts))

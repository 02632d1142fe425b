"""Loads the trained run from whose samples an objective learns."""

import dataclasses

from vcm_jax import pretrained, weights
from vcm_jax.models import MODELS, ModelConfig
from vcm_jax.objectives import Objective, read_section
from vcm_jax.objectives.flow_matching import FlowMatchingConfig
from vcm_jax.runs import description
from vcm_jax.training.loss import Teacher


def load_teacher(settings, net, manifest):
    """The teacher that an objective needs, and its variables.

    Args:
      settings: the objective.
      net: the student's network; the teacher's must have the same sizes, but for `blocks_at_s` and
        the input for guidance.
      manifest: of the student's records, or None where there are no records yet.

    Returns:
      (Teacher, variables), or (None, None) for objectives without a teacher.

    Raises:
      ValueError: when there is no teacher, or its sizes, features or latents differ from those of
        the student.
    """
    if not settings.has_teacher:
        return None, None
    if not settings.teacher:
        raise ValueError(
            "objective.teacher is empty: name the workdir of a trained run, or public weights"
        )
    workdir = settings.teacher
    model, objective = _read_teacher(workdir, net.config, manifest)
    # A teacher need not have blocks that see s, or an input for guidance; it may have them alone.
    own = {name: getattr(model, name) for name in ("blocks_at_s", "guidance_input")}
    student = dataclasses.replace(net.config, **own)
    if model != student:
        names = [
            field.name
            for field in dataclasses.fields(model)
            if getattr(model, field.name) != getattr(student, field.name)
        ]
        raise ValueError(
            f"objective.teacher {workdir} is of another size: "
            + ", ".join(f"{n} {getattr(model, n)}, not {getattr(net.config, n)}" for n in names)
        )
    if settings.teacher_velocity == "plain" and settings.guides and _is_guided(objective):
        raise ValueError(
            f"objective.teacher {workdir} has guidance in its weights: it takes "
            "objective.guidance_scale=1"
        )
    steps = getattr(settings, "teacher_steps", 0)
    teacher = Teacher(net.clone(config=model), objective, steps)
    variables = weights.read(workdir)
    if lacking := {"latent_mean", "latent_std", "empty_text"} - variables["stats"].keys():
        raise ValueError(f"objective.teacher {workdir} lacks {', '.join(sorted(lacking))}")
    return teacher, variables


def _is_guided(objective: Objective) -> bool:
    """Whether the network of an objective is guided without further evaluations."""
    if objective.instant_only or objective.guidance_input:
        return False
    return objective.guidance_scale != 1


def _read_teacher(workdir, student: ModelConfig, manifest) -> tuple[ModelConfig, Objective]:
    """The sizes and the objective of a teacher, whose data must be those of the student."""
    if pretrained.is_public(workdir):
        public = pretrained.resolve(workdir).public
        lengths = {
            field.name: getattr(student, field.name)
            for field in dataclasses.fields(student)
            if field.name.endswith("_seq_len") or field.name == "latent_rate"
        }
        model = dataclasses.replace(MODELS[public.model], **lengths)
        return model, FlowMatchingConfig(guidance_scale=public.guidance_scale)
    try:
        described = description.read(workdir)
    except ValueError as error:
        raise ValueError(f"objective.teacher {error}") from None
    for what in ("codec", "encoders") if manifest else ():
        if getattr(described, what) != getattr(manifest, what):
            raise ValueError(
                f"objective.teacher {workdir} was trained with other {what} than the records have: "
                f"{getattr(described, what)}, not {getattr(manifest, what)}"
            )
    return described.model, read_section(described.config["objective"])[0]

"""Loads the trained run from whose samples an objective learns."""

import dataclasses

from vcm_jax import weights
from vcm_jax.objectives import read_section
from vcm_jax.runs import description
from vcm_jax.training.step import Teacher


def load_teacher(settings, net, manifest):
    """The teacher that an objective needs, and its variables.

    Args:
      settings: the objective.
      net: the student's network; the teacher's must have the same sizes.
      manifest: of the student's records, or None where there are no records yet.

    Returns:
      (Teacher, variables), or (None, None) for objectives without a teacher.

    Raises:
      ValueError: when there is no teacher, or its sizes, features or latents differ from those of
        the student.
    """
    if not settings.needs_teacher:
        return None, None
    if not settings.teacher:
        raise ValueError("objective.teacher is empty: name the workdir of a trained run")
    workdir = settings.teacher
    try:
        described = description.read(workdir)
    except ValueError as error:
        raise ValueError(f"objective.teacher {error}") from None
    model = described.model
    if model != net.config:
        names = [
            field.name
            for field in dataclasses.fields(model)
            if getattr(model, field.name) != getattr(net.config, field.name)
        ]
        raise ValueError(
            f"objective.teacher {workdir} is of another size: "
            + ", ".join(f"{n} {getattr(model, n)}, not {getattr(net.config, n)}" for n in names)
        )
    for what in ("codec", "encoders") if manifest else ():
        if getattr(described, what) != getattr(manifest, what):
            raise ValueError(
                f"objective.teacher {workdir} was trained with other {what} than the records have: "
                f"{getattr(described, what)}, not {getattr(manifest, what)}"
            )
    objective, _ = read_section(described.config["objective"])
    teacher = Teacher(net, objective, settings.teacher_steps)
    return teacher, weights.read_run(workdir)

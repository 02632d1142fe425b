"""Reading the trained run that teaches a reflow run."""

import dataclasses

from vcm_jax.objectives import read_section
from vcm_jax.runs import averages, description
from vcm_jax.training.step import Teacher


def load_teacher(settings, net, manifest):
    """(Teacher, its variables) of a reflow run; (None, None) for other objectives.

    Args:
      settings: of the objective.
      net: the student's network, whose sizes are the teacher's too.
      manifest: of the student's records; None where there are none yet.

    Raises:
      ValueError: when there is no teacher, or it has other sizes, features or latents.
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
    return teacher, averages.restore_weights(workdir)

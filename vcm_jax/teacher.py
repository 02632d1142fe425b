"""Reading the trained run that teaches a reflow run."""

from vcm_jax import checkpoint, runs
from vcm_jax.models import ModelConfig
from vcm_jax.objectives import read_section
from vcm_jax.objectives.reflow import ReflowConfig
from vcm_jax.train_step import Teacher


def load_teacher(settings, net, codec: dict):
    """(Teacher, its variables) of a reflow run; (None, None) for other objectives.

    Args:
      settings: of the objective.
      net: the student's network, whose sizes are the teacher's too.
      codec: description of the student's latents.

    Raises:
      ValueError: when there is no teacher, or it has other sizes or other latents.
    """
    if not isinstance(settings, ReflowConfig):
        return None, None
    if not settings.teacher:
        raise ValueError("objective.teacher is empty: name the workdir of a trained run")
    workdir = settings.teacher
    try:
        run = runs.describe(workdir)
    except ValueError as error:
        raise ValueError(f"objective.teacher {error}") from None
    model = ModelConfig(**run["model"])
    if model != net.config:
        names = [n for n in run["model"] if getattr(model, n) != getattr(net.config, n)]
        raise ValueError(
            f"objective.teacher {workdir} is of another size: "
            + ", ".join(f"{n} {getattr(model, n)}, not {getattr(net.config, n)}" for n in names)
        )
    if run["codec"] != codec:
        raise ValueError(
            f"objective.teacher {workdir} has latents of another codec: {run['codec']}"
        )
    teacher = Teacher(net, read_section(run["config"]["objective"])[0], settings.teacher_steps)
    return teacher, checkpoint.restore_weights(workdir)

"""What the commands show of the log."""

from absl import logging


def show_ours() -> None:
    """Shows this package's information and everybody's warnings; Orbax alone says a lot more.

    What Orbax raises it also logs with a traceback; who catches it here says it in a line.
    """
    logging.set_verbosity(logging.INFO)
    logging.get_absl_handler().addFilter(
        lambda record: (
            "vcm_jax" in record.pathname
            or (record.levelno >= 30 and not (record.exc_info and "orbax" in record.pathname))
        )
    )

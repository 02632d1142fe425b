"""What the commands show of the log."""

from absl import logging


def show_ours() -> None:
    """Shows this package's information and everybody's warnings; Orbax alone says a lot more."""
    logging.set_verbosity(logging.INFO)
    logging.get_absl_handler().addFilter(
        lambda record: record.levelno >= 30 or "vcm_jax" in record.pathname
    )

"""Trains a model: `python -m vcm_jax.main --config=configs/s16k.py --workdir=runs/s16k`.

To resume a run, run the same command again.
"""

import sys

from absl import app, flags
from ml_collections import config_flags

from vcm_jax import train
from vcm_jax.logs import show_ours

CONFIG = config_flags.DEFINE_config_file("config", None, "What to train: a file of configs/.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, events, codec.")


def main(argv):
    if argv[1:]:
        raise app.UsageError(f"not understood: {' '.join(argv[1:])}")
    show_ours()
    try:
        train.train(CONFIG.value, WORKDIR.value)
    except (train.SetupError, train.NonFiniteError) as error:
        sys.exit(f"error: {error}")


def parse_flags(argv):
    """absl's parser; what a config file or a flag has against it becomes one line."""
    try:
        rest = flags.FLAGS(argv)
        dict(CONFIG.value)  # a file that could not be read raises when it is looked at
        return rest
    except flags.Error as error:  # of a config file that raises, the last line of its traceback
        line = str(error).strip().splitlines()[-1].strip().removeprefix("ValueError: ")
        sys.exit(f"error: {line}")
    except (AttributeError, KeyError, OSError) as error:
        lines = str(error.args[-1] if error.args else error).split("\n")
        text = " ".join(line.strip() for line in lines if line.strip())
        key = text.strip("'\"")
        if given := [arg for arg in argv if arg.startswith("--config.") and f".{key}" in arg]:
            text = f"{given[0]}: this config has no {key}"
        sys.exit(f"error: config: {text}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=parse_flags)

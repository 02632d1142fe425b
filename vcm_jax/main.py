"""Trains a model: `python -m vcm_jax.main --config=configs/s16k.py --workdir=runs/s16k`.

The same command on every machine of a run; to resume a run, run it again. Exit codes: 0 done; 1 the
line on stderr says what is wrong; 74 nothing can be saved any more; 75 a SIGTERM, the state is
saved; 130 Ctrl-C.
"""

import errno
import os
import sys

import jax
from absl import app, flags
from ml_collections import config_flags

from vcm_jax.cli import show_ours
from vcm_jax.devices import distributed, preemption
from vcm_jax.runs import checkpoint
from vcm_jax.training import loop

CONFIG = config_flags.DEFINE_config_file("config", None, "What to train: a file of configs/.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, events, codec.")
DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Compile, print what the run would take, and stop; writes nothing."
)
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


def main(argv):
    if argv[1:]:
        raise app.UsageError(f"not understood: {' '.join(argv[1:])}")
    show_ours()
    preemption.leave_at_once()
    try:
        distributed.initialize()
        loop.train(CONFIG.value, WORKDIR.value, DRY_RUN.value)
    except (distributed.DistributedError, loop.SetupError, loop.NonFiniteError) as error:
        leave(1, f"error: {error}")
    except OSError as error:
        unwritable = isinstance(error, checkpoint.StorageError) or error.errno in UNWRITABLE
        leave(74 if unwritable else 1, f"error: {error}")
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        leave(
            1,
            "error: the devices have not enough memory: a smaller batch_size, accumulate, "
            "remat=products or full, or a larger mesh.fsdp needs less (--dry_run says how much)",
        )
    except preemption.Preempted as saved:
        print(f"{saved}; the same command goes on", file=sys.stderr, flush=True)
        if jax.distributed.is_initialized():  # all leave together: none is missed by another
            jax.distributed.shutdown()
        sys.exit(preemption.EXIT_CODE)
    except KeyboardInterrupt:
        leave(130, "interrupted; the same command goes on from the last checkpoint")


def leave(code: int, line: str) -> None:
    """Ends the process; one of several does not wait for others that wait for it.

    Nor does one that cannot write: what Orbax leaves behind complains at length when it is torn
    down, and the line would not be the last.
    """
    print(line, file=sys.stderr, flush=True)
    if code == 74 or jax.distributed.is_initialized():
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


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

"""Trains a model.

    python -m vcm_jax.main --config=configs/s16k.py --workdir=runs/s16k
    python -m vcm_jax.main --config=configs/impacts.py:soflow --workdir=runs/soflow
    python -m vcm_jax.main --config=s16k --workdir=runs/mine --config.batch_size=64 --dry_run
    python -m vcm_jax.main --config=s16k --workdir=none --dry_run --config.topology=v5e:4x4

--config is a file or the name of one of this project's; --config.KEY=VALUE overrides its settings.
The same command runs on every machine of a run, and resumes the run when it is run again.

Exit codes: 0 done; 1 the line on stderr says what is wrong; 74 nothing can be saved any more; 75 a
SIGTERM came and the state is saved; 76 another process of the run has died; 130 Ctrl-C.
"""

from vcm_jax.devices import preemption, supervisor

if __name__ == "__main__":  # before the imports below, which take seconds
    preemption.leave_at_once()
    supervisor.supervise()

import errno
import os
import sys
import traceback

from absl import app, flags
from ml_collections import config_flags

from vcm_jax import cli, usage
from vcm_jax.atomic import UNWRITABLE
from vcm_jax.devices import distributed
from vcm_jax.runs import checkpoint
from vcm_jax.training import configs, loop

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "What to train: a file, or a name such as s16k."
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, events, codec.")
DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Compile, print what the run would take, and stop; writes nothing."
)
FIT = flags.DEFINE_bool(
    "fit", False, "With --dry_run: look for the largest batch_size that fits; compiles often."
)
PEER_TIMEOUT = flags.DEFINE_integer(
    "peer_timeout",
    60,
    "Seconds without a sign of life after which another process of the run counts as dead.",
    lower_bound=1,
)
flags.register_validator(
    "workdir", lambda value: value is None or bool(value.strip()), "must name a folder"
)
MEMORY_HINT = (
    "use a smaller batch_size, accumulate, remat=products or full, or a larger mesh.fsdp "
    "(--dry_run prints the memory that each of them takes)"
)
RESUME_HINT = "run the same command again to resume"


def main(argv):
    if argv[1:]:
        raise app.UsageError(f"not understood: {' '.join(argv[1:])} (flags begin with --)")
    if FIT.value and not DRY_RUN.value:
        raise app.UsageError("--fit is for --dry_run")
    cli.show_ours()
    try:
        distributed.initialize(PEER_TIMEOUT.value)
        loop.train(CONFIG.value, WORKDIR.value, DRY_RUN.value, FIT.value)
    except preemption.Preempted as saved:
        print(f"{saved}; {RESUME_HINT}", file=sys.stderr, flush=True)
        distributed.shutdown()
        sys.exit(preemption.EXIT_CODE)
    except (Exception, KeyboardInterrupt) as error:
        found = explain(error)
        if found is None and not distributed.is_initialized():
            raise
        if found is None:
            traceback.print_exc()
        leave(*found or (1, f"error: {cli.describe(error)} (the traceback is above)"))


def explain(error: BaseException) -> tuple[int, str] | None:
    """(exit code, line) of an error that training may meet; None for a bug."""
    if distributed.is_peer_lost(error):
        return distributed.PEER_LOST, distributed.PEER_LOST_LINE
    if isinstance(error, KeyboardInterrupt):
        return 130, f"interrupted; {RESUME_HINT} from the last checkpoint"
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return cli.explain(error, MEMORY_HINT)
    if isinstance(error, OSError):
        unwritable = error.errno in (*UNWRITABLE, errno.EIO)
        unwritable |= isinstance(error, checkpoint.StorageError)
        return 74 if unwritable else 1, f"error: {cli.describe(error)}"
    if isinstance(error, distributed.DistributedError | loop.SetupError | loop.NonFiniteError):
        return 1, f"error: {error}"
    return None


def leave(code: int, line: str) -> None:
    """Ends this process, and the other ones of the run, with an exit code and a line on stderr.

    It does not wait for threads: those of other processes may wait for this one, and what a failed
    save leaves behind would print a long complaint below the line.
    """
    print(line, file=sys.stderr, flush=True)
    if code == 74 or distributed.is_initialized():
        distributed.tell_others(code, line)
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def parse_flags(argv):
    """absl's parser; whatever is wrong with a config file or a flag becomes one line."""
    if usage.is_wanted(argv):
        cli.show_help(__doc__, ("config", "workdir", "dry_run", "fit", "peer_timeout"))
    try:
        rest = flags.FLAGS(configs.resolve(argv))
        dict(CONFIG.value)  # a file that could not be read raises when it is looked at
        return rest
    except configs.ConfigError as error:
        sys.exit(f"error: {error}")
    except flags.Error as error:  # for a config file that raises, the last line of its traceback
        line = str(error).strip().splitlines()[-1].strip().removeprefix("ValueError: ")
        sys.exit(f"error: {line}")
    except (AttributeError, KeyError, OSError) as error:
        while error.args and isinstance(error.args[-1], Exception):
            error = error.args[-1]
        lines = str(error.args[-1] if error.args else error).split("\n")
        text = " ".join(line.strip() for line in lines if line.strip())
        key, _, guess = text.partition(" Did you mean ")
        key = key.strip("'\"")
        if given := [arg for arg in argv if arg.startswith("--config.") and f".{key}" in arg]:
            text = f"{given[0]}: this config has no {key}"
            text += f". Did you mean {guess}" if guess else ""
        sys.exit(f"error: config: {text}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=parse_flags)

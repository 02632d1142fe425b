"""How the processes of a run find each other: one command line everywhere."""

import glob
import importlib.util
import os
import re
from collections.abc import Mapping

import jax
from orbax.checkpoint import multihost


class DistributedError(ValueError):
    """Processes that cannot find each other; one line that names the variable."""


def _variable(env: Mapping[str, str], name: str) -> str | None:
    """NAME or JAX_NAME."""
    return env.get(f"JAX_{name}") or env.get(name)


def _on_tpu(env: Mapping[str, str]) -> bool:
    """Whether this machine has TPU chips and JAX may use them."""
    if env.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu":
        return False
    chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def slurm_device_ids(env: Mapping[str, str]) -> list[int] | None:
    """Which of the GPUs it sees a Slurm task takes; None where Slurm gave it none.

    A task alone on its node takes all it sees, a task that sees one takes that one, and tasks that
    all see the same several take one each.
    """
    gpus = env.get("CUDA_VISIBLE_DEVICES") or ""
    seen = len(gpus.split(",")) if gpus else int(env.get("SLURM_GPUS_ON_NODE") or 0)
    # "2(x3),1": tasks of each node in turn; nodes of one job step are equal enough to take the max.
    tasks = re.sub(r"\(x\d+\)", "", env.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    tasks_here = max(map(int, tasks.split(",")))
    if not seen:
        return None
    if tasks_here == 1 or seen == 1:
        return list(range(seen))
    return [int(env["SLURM_LOCALID"])]


def settings(env: Mapping[str, str]) -> dict | None:
    """Arguments for `jax.distributed.initialize`; None for a run of one process.

    In this order: COORDINATOR_ADDRESS (HOST:PORT), NUM_PROCESSES and PROCESS_ID, each also with
    JAX_ before it; the tasks of a Slurm step; a TPU machine, whose neighbours the platform knows.

    Raises:
      DistributedError: variables that are missing or are no numbers.
    """
    address = _variable(env, "COORDINATOR_ADDRESS")
    if address:
        found = {"coordinator_address": address}
        for key in ("num_processes", "process_id"):
            value = _variable(env, key.upper())
            if value is None or not value.isdigit():
                raise DistributedError(
                    f"COORDINATOR_ADDRESS is {address!r}, so {key.upper()} must be a number, "
                    f"not {value!r}"
                )
            found[key] = int(value)
        if not re.fullmatch(r".+:\d+", address):
            raise DistributedError(f"COORDINATOR_ADDRESS must be HOST:PORT, not {address!r}")
        if found["process_id"] >= found["num_processes"]:
            raise DistributedError(
                f"PROCESS_ID {found['process_id']} must be below NUM_PROCESSES "
                f"{found['num_processes']}"
            )
        return found
    if "SLURM_STEP_NODELIST" in env and int(env.get("SLURM_NTASKS", 1)) > 1:
        return {"local_device_ids": slurm_device_ids(env)}
    if _on_tpu(env):
        return {}
    return None


def initialize() -> None:
    """Joins the other processes of the run, where there are any; before any other use of JAX.

    Raises:
      DistributedError: when they cannot be reached.
    """
    found = settings(os.environ)
    if found is None:
        return
    try:
        jax.distributed.initialize(**found)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DistributedError(f"the run's processes did not meet ({found}): {reason}") from error


def wait_for_all(what: str) -> None:
    """Returns when every process of the run is here; collectives give up on one that is late.

    It goes through the coordinator, no device takes part.
    """
    multihost.sync_global_processes(what, timeout=3600)

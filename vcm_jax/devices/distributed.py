"""How the processes of a run find each other, and how the others end when one of them has ended.

This module loads no JAX before it is needed: see `preemption`.
"""

import atexit
import glob
import importlib.util
import json
import os
import re
import sys
import threading
import time
from collections.abc import Mapping

# EX_PROTOCOL of sysexits.h: another process has died. The same command resumes from the last
# checkpoint, and the scripts in launch/ start it again.
PEER_LOST = 76
PEER_LOST_LINE = (
    "error: another process of this run has died (its own log says why); run the same command "
    "again on all machines to resume from the last checkpoint"
)
# What errors of collectives and of JAX's coordination service say when a process is gone.
_PEER_LOST_TEXTS = re.compile(
    r"Gloo|NCCL|heartbeat|[Cc]onnection (closed|reset)|Socket closed|CoordinationService"
    r"|coordination service|Barrier failed|preempted, or crashed"
)
_END_KEY = "vcm_jax/end"  # where a process that ends early says so, in JAX's key-value store
_POLL = 1.0  # seconds between two looks at it

_stop_polling = threading.Event()


class DistributedError(ValueError):
    """The processes cannot find each other; one line that names the variable."""


def _variable(env: Mapping[str, str], name: str) -> str | None:
    """The value of JAX_NAME or NAME."""
    return env.get(f"JAX_{name}") or env.get(name)


def _on_tpu(env: Mapping[str, str]) -> bool:
    """Whether this machine has TPU chips and JAX may use them."""
    if env.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu":
        return False
    chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def slurm_device_ids(env: Mapping[str, str]) -> list[int] | None:
    """The GPUs that a Slurm task uses, as indices of those it sees; None if Slurm gave it none.

    A task that is alone on its node uses all GPUs it sees. A task that sees one GPU uses that one.
    Tasks of one node that all see the same GPUs use one each.
    """
    gpus = env.get("CUDA_VISIBLE_DEVICES") or ""
    seen = len(gpus.split(",")) if gpus else int(env.get("SLURM_GPUS_ON_NODE") or 0)
    # The value is like "2(x3),1": the number of tasks of each node. The nodes of one job step are
    # similar enough to take the maximum.
    tasks = re.sub(r"\(x\d+\)", "", env.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    tasks_here = max(map(int, tasks.split(",")))
    if not seen:
        return None
    if tasks_here == 1 or seen == 1:
        return list(range(seen))
    return [int(env["SLURM_LOCALID"])]


def settings(env: Mapping[str, str]) -> dict | None:
    """Arguments for `jax.distributed.initialize`; None for a run of one process.

    The first of these that is there decides: the variables COORDINATOR_ADDRESS (HOST:PORT),
    NUM_PROCESSES and PROCESS_ID, each also with the prefix JAX_; the variables of a Slurm step with
    several tasks; the chips of a TPU machine, whose platform knows the other machines.

    Raises:
      DistributedError: a variable is missing or not a number.
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


def initialize(peer_timeout: int = 60) -> None:
    """Connects to the other processes of the run, if there are any; before any other use of JAX.

    Args:
      peer_timeout: seconds without a sign of life after which a process counts as dead.

    Raises:
      DistributedError: the processes cannot reach each other.
    """
    found = settings(os.environ)
    if found is None:
        return
    import jax

    try:
        jax.distributed.initialize(**found, heartbeat_timeout_seconds=peer_timeout)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DistributedError(
            f"the processes of the run cannot reach each other ({found}): {reason}"
        ) from error
    atexit.register(_stop_polling.set)
    threading.Thread(target=_end_with_the_others, daemon=True).start()


def is_initialized() -> bool:
    """Whether the run has several processes."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def _client():
    """JAX's connection to the key-value store of the run; JAX has no public access to it."""
    from jax._src import distributed

    return distributed.global_state.client


def tell_others(code: int, line: str) -> None:
    """Lets the other processes end with this exit code, now; they print the line.

    Otherwise they would wait for this process until it counts as dead.
    """
    import jax

    _stop_polling.set()
    if not is_initialized():
        return
    told = {"process": jax.process_index(), "code": code, "line": line}
    try:
        _client().key_value_set(_END_KEY, json.dumps(told))
    except Exception:  # another process was first, or the store's process has ended
        return
    if jax.process_index() == 0:  # the store ends with this process
        time.sleep(2.5 * _POLL)


def _end_with_the_others() -> None:
    """Ends this process when another one says that it ends."""
    while not _stop_polling.wait(_POLL):
        client = _client()
        try:
            told = client and client.key_value_try_get(_END_KEY)
        except Exception:  # nothing is there yet, or the store is gone, which JAX notices itself
            continue
        if told and not _stop_polling.is_set():
            told = json.loads(told)
            print(
                f"process {told['process']} of this run has ended with exit code {told['code']}: "
                f"{told['line']}",
                file=sys.stderr,
                flush=True,
            )
            os._exit(told["code"])


def is_peer_lost(error: BaseException | None) -> bool:
    """Whether an error says that another process of the run has died."""
    while error is not None and is_initialized():
        if _PEER_LOST_TEXTS.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def wait_for_all(what: str) -> None:
    """Returns when every process of the run has called it.

    Collectives give up on a process that is late, this does not: it takes no device, the processes
    meet through the coordinator.
    """
    from orbax.checkpoint import multihost

    multihost.sync_global_processes(what, timeout=3600)


def shutdown() -> None:
    """Leaves the run together with all other processes, so that none counts as dead."""
    import jax

    _stop_polling.set()
    if is_initialized():
        jax.distributed.shutdown()

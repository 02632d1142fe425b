"""Checkpoints of a run: its state and what it is, saved together and atomically (Orbax)."""

import contextlib
import os
import secrets
import time
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint import multihost

from vcm_jax.hashes import open_seal, seal
from vcm_jax.runs.fingerprints import fingerprints

# A save that failed is tried again after so many seconds, twice; then the run stops.
RETRY_AFTER = (2.0, 10.0)
_FINGERPRINTS = "fingerprints"  # entry of `meta`
# Texts of errors after which the files may be whole although they could not be read.
_TEMPORARY = (
    "permission",
    "resource_exhausted",
    "too many open files",
    "out of memory",
    "timed out",
)


class CheckpointError(ValueError):
    """A checkpoint is not there or does not fit; one line that says what would."""


class DamagedError(CheckpointError):
    """The files or values of a checkpoint are not those that were saved; one line names them."""


class UnreadableError(DamagedError):
    """This process cannot read the files of a checkpoint."""


class StorageError(OSError):
    """Nothing can be saved any more; one line with the place, the reason and the last saves."""


def check_writable(workdir) -> None:
    """Raises StorageError if no file can be written in the workdir."""
    probe = Path(workdir) / f".probe.{secrets.token_hex(4)}"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise StorageError(f"{workdir} cannot be written: {error.strerror}") from error


def open_manager(workdir, keep_every: int | None = None, read_only: bool = False):
    """Orbax's manager of the checkpoints under WORKDIR/checkpoints; the last three are kept.

    Args:
      workdir: of the run.
      keep_every: also keep the checkpoints of steps that are multiples of this, for good.
      read_only: nothing can be saved, and incomplete checkpoints are not removed, as a run may be
        writing them at this moment.
    """
    options = ocp.CheckpointManagerOptions(
        max_to_keep=3,
        keep_period=keep_every,
        cleanup_tmp_directories=not read_only,
        read_only=read_only,
    )
    directory = Path(workdir).absolute() / "checkpoints"
    handlers = {"state": ocp.PyTreeCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
    return ocp.CheckpointManager(directory, options=options, item_handlers=handlers)


def latest_step(workdir) -> int | None:
    """The step that a run in this workdir resumes from; None for a new run."""
    if not (Path(workdir) / "checkpoints").is_dir():
        return None
    with open_manager(workdir, read_only=True) as manager:
        return manager.latest_step()


class Saver:
    """Saves in the background, and tries again if that fails, but not without end.

    In a run of several processes none can try again alone: there the first failure stops the run.
    Leaving the context of a saver waits for its last save.

    Args:
      manager: from `open_manager` or `open_snapshots`; the saver closes it.
    """

    def __init__(self, manager: ocp.CheckpointManager):
        self.manager = manager
        self._failures = 0
        # It stays open, so that a new directory of the same name can be told from this one.
        local = os.path.isdir(manager.directory)
        self._directory = os.open(manager.directory, os.O_RDONLY) if local else None

    def _check_directory(self) -> None:
        """Orbax would make a directory that vanished anew, and hide that all in it is lost."""
        found = self.manager.directory.is_dir()
        if found and self._directory is not None:
            found = os.path.samestat(os.stat(self.manager.directory), os.fstat(self._directory))
        if not found:
            raise FileNotFoundError("the directory is gone")

    def save(self, step: int, state, meta: dict, wait: bool = False) -> None:
        """Saves a pytree of arrays and JSON; with `wait` it is on disk when this returns.

        Fingerprints of the arrays are saved with them and checked on every restore.

        Raises:
          StorageError: after the last try; earlier checkpoints are whole.
        """
        meta = seal(meta | {_FINGERPRINTS: fingerprints(state)})
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(meta))
        while True:
            try:
                self._check_directory()
                self.manager.wait_until_finished()
                self.manager.save(step, args=args, force=True)
                if wait:
                    self.manager.wait_until_finished()
                    self._failures = 0
                return
            except Exception as error:  # tensorstore and Orbax raise many kinds
                self._failed(error)

    def failed(self) -> bool:
        """Whether a save in the background has failed, so that one is due now; waits for none."""
        if jax.process_count() > 1 or self.manager.is_saving_in_progress():
            return False
        try:
            self.manager.wait_until_finished()
        except Exception as error:
            self._failed(error)
            return True
        self._failures = 0
        return False

    def drop_after(self, step: int) -> None:
        """Deletes what was saved after the step that the run resumes from."""
        for later in self.manager.all_steps():
            if later > step:
                self.manager.delete(later)

    def _failed(self, error: Exception) -> None:
        self._failures += 1
        reason = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        if "No space left" in str(error):
            reason = "No space left on device"
        where = self.manager.directory
        if self._failures > len(RETRY_AFTER) or jax.process_count() > 1:
            there = sorted(int(p.name) for p in where.glob("*") if p.name.isdigit())
            raise StorageError(
                f"{where} cannot be saved to: {reason[:200]}; there and whole: {there or 'nothing'}"
            ) from error
        seconds = RETRY_AFTER[self._failures - 1]
        logging.warning("%s: saving failed (%s); again in %g s", where, reason[:200], seconds)
        time.sleep(seconds)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        """Waits for what is being saved."""
        if self._directory is not None:
            os.close(self._directory)
        try:
            self.manager.close()
        except Exception as error:
            if kind is None:
                self._failures = len(RETRY_AFTER)
                self._failed(error)
            logging.warning("%s: the last save failed: %s", self.manager.directory, error)


def _shapes(tree) -> dict[str, tuple]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves
    }


def check_shapes(found, wanted, what: str) -> None:
    """Raises CheckpointError, naming the first differences, when two trees differ in shapes."""
    found, wanted = _shapes(found), _shapes(wanted)
    different = sorted(k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k))
    if different:
        lines = [
            f"{k} is {found.get(k, 'missing')}, wanted {wanted.get(k, 'none')}"
            for k in different[:3]
        ]
        raise CheckpointError(
            f"{what} was made with another configuration ({len(different)} arrays differ): "
            + "; ".join(lines)
        )


def existing_step(manager, step: int | None) -> int:
    """`step`, or the latest one for None; CheckpointError if it is not there."""
    there = sorted(manager.all_steps())
    if step is None and there:
        return there[-1]
    if step is None:
        raise CheckpointError(f"{manager.directory}: nothing is saved there yet")
    if step not in there:
        raise CheckpointError(
            f"{manager.directory}: no checkpoint of step {step}; there are {there or 'none'}"
        )
    return step


def restore(manager: ocp.CheckpointManager, abstract_state, step: int | None = None):
    """The state of a step, the latest by default.

    Args:
      manager: from `open_manager`.
      abstract_state: shapes, dtypes and target shardings; other meshes and process counts than
        those that saved it are fine.
      step: which.

    Raises:
      CheckpointError: there is no such step, or its arrays have other shapes.
      DamagedError: it cannot be read, or its values are not those that were saved.
    """
    step = existing_step(manager, step)
    meta = read_meta(manager, step)
    with readable(manager, step):
        saved = manager.item_metadata(step)["state"]
    check_shapes(saved, abstract_state, f"the checkpoint {manager.directory}/{step}")
    args = ocp.args.PyTreeRestore(
        item=abstract_state,
        restore_args=ocp.checkpoint_utils.construct_restore_args(abstract_state),
    )
    with readable(manager, step):
        state = manager.restore(step, args=ocp.args.Composite(state=args))["state"]
    check_values(state, meta, manager, step)
    return state


def check_values(tree, meta: dict, manager, step: int) -> None:
    """Compares restored arrays with the fingerprints that were saved with them.

    Args:
      tree: the whole tree that was saved, or part of it with the same paths.
      meta: from `read_meta`.
      manager, step: where it was restored from, for messages.

    Raises:
      DamagedError: some of the values were not saved like this; the line names the arrays.
    """
    where, saved = f"{manager.directory}/{step}", meta.get(_FINGERPRINTS)
    if saved is None:
        logging.info("%s was saved without fingerprints: its values cannot be checked", where)
        return
    found = fingerprints(tree)
    wrong = [name for name, value in found.items() if saved.get(name) != value]
    if wrong:
        more = f" and {len(wrong) - 3} more arrays" if len(wrong) > 3 else ""
        raise DamagedError(
            f"{where} is damaged: the values of {', '.join(wrong[:3])}{more} are not those that "
            f"were saved; {_name_earlier(manager, step)}"
        )


def set_aside(manager, workdir, step: int) -> Path:
    """Moves a damaged checkpoint to WORKDIR/damaged, so that an earlier one is the latest.

    The first process of a run moves it; every process must call this.
    """
    target = Path(workdir).absolute() / "damaged" / str(step)
    while target.exists():
        target = target.with_name(f"{target.name}_again")
    if jax.process_index() == 0:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(manager.directory / str(step), target)
    multihost.sync_global_processes(f"set_aside_{step}")
    manager.reload()
    return target


def read_meta(manager, step: int) -> dict:
    """The `meta` that was saved with a step.

    Raises:
      DamagedError: it cannot be read, or is not what was saved.
    """
    with readable(manager, step):
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        meta = manager.restore(step, args=args)["meta"]
    where = f"{manager.directory}/{step}"
    try:
        return open_seal(meta, where)
    except ValueError as error:
        raise DamagedError(
            f"{where} is damaged: its meta is not what was saved; {_name_earlier(manager, step)}"
        ) from error


@contextlib.contextmanager
def readable(manager, step: int):
    """What Orbax and TensorStore raise, in many kinds, becomes one of the errors below.

    Raises:
      CheckpointError: the files may be whole, but could not be read (permissions, memory).
      UnreadableError: the files are damaged.
    """
    try:
        yield
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        line = f"{manager.directory}/{step} cannot be read ({reason[:200]})"
        temporary = isinstance(error, PermissionError | MemoryError)
        if temporary or any(text in str(error).lower() for text in _TEMPORARY):
            raise CheckpointError(line) from error
        raise UnreadableError(f"{line}: it is damaged; {_name_earlier(manager, step)}") from error


def _name_earlier(manager, step: int) -> str:
    earlier = [str(at) for at in manager.all_steps() if at < step]
    return f"earlier checkpoints: {', '.join(earlier)}" if earlier else "there is no earlier one"

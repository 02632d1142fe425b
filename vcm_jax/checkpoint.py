"""State, data position and description of a run, saved together in one atomic step (Orbax)."""

from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp


class CheckpointError(ValueError):
    """A checkpoint that is not there or does not fit; one line that says what would."""


def open_manager(workdir, keep_every: int | None = None, read_only: bool = False):
    """The checkpoints of a run, under WORKDIR/checkpoints: the last three and some for good.

    Half-written ones are removed, unless it is `read_only`: a run may be writing them just now.

    Args:
      workdir: of the run.
      keep_every: checkpoints of every so many steps stay for good.
      read_only: nothing can be saved, and nothing is removed.
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


def save(manager: ocp.CheckpointManager, state, meta: dict) -> None:
    """Saves in the background; `meta` is JSON. Wait with `manager.wait_until_finished()`."""
    manager.save(
        int(state.step),
        args=ocp.args.Composite(state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(meta)),
    )


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


def _existing_step(manager, step: int | None) -> int:
    """`step`, or the latest one for None; a CheckpointError when it is not there."""
    there = sorted(manager.all_steps())
    if step is None and there:
        return there[-1]
    if step not in there:
        raise CheckpointError(
            f"{manager.directory}: no checkpoint of step {step}; there are {there or 'none'}"
        )
    return step


def restore(manager: ocp.CheckpointManager, abstract_state, step: int | None = None):
    """(state, meta) of a step, the latest by default.

    Args:
      manager: from `open_manager`.
      abstract_state: shapes, dtypes and target shardings; other meshes and process counts than
        those that saved it are fine.
      step: which.

    Raises:
      CheckpointError: when there is no such step, or its arrays have other shapes.
    """
    step = _existing_step(manager, step)
    saved = manager.item_metadata(step)["state"]
    check_shapes(saved, abstract_state, f"the checkpoint {manager.directory}/{step}")
    restored = manager.restore(
        step,
        args=ocp.args.Composite(
            state=ocp.args.PyTreeRestore(
                item=abstract_state,
                restore_args=ocp.checkpoint_utils.construct_restore_args(abstract_state),
            ),
            meta=ocp.args.JsonRestore(),
        ),
    )
    return restored["state"], restored["meta"]


def read_meta(manager, step: int) -> dict:
    """The `meta` that was saved with a step."""
    return manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]


def restore_weights(workdir, step: int | None = None, sigma_rel: float | None = None):
    """The averaged weights of a run, as the network's variables, on the default device.

    Args:
      workdir: of the run.
      step: which checkpoint, the latest by default.
      sigma_rel: width of the average, the first that the run keeps by default.

    Returns:
      `{"params": ..., "stats": ...}` of numpy arrays.

    Raises:
      CheckpointError: when there is no such checkpoint or average.
    """
    directory = Path(workdir) / "checkpoints"
    if not directory.is_dir():
        raise CheckpointError(f"{workdir}: no checkpoints there (the workdir of a run is wanted)")
    with open_manager(workdir, read_only=True) as manager:
        step = _existing_step(manager, step)
        tree = manager.item_metadata(step)["state"].tree
        widths = sorted(tree["ema"], key=float)
        width = widths[0] if sigma_rel is None else f"{sigma_rel:g}"
        if width not in widths:
            raise CheckpointError(
                f"{directory}/{step}: no average of sigma_rel {width}, only {', '.join(widths)}"
            )
        wanted = {"ema": {width: tree["ema"][width]}, "stats": tree["stats"]}
        # To the host: the devices may be others than those that saved it.
        on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        args = ocp.args.Composite(
            state=ocp.args.PyTreeRestore(item=wanted, restore_args=on_host, partial_restore=True)
        )
        restored = manager.restore(step, args=args)["state"]
    return {"params": restored["ema"][width], "stats": restored["stats"]}

"""EMA weights of a run: reading them, keeping snapshots of them, and other widths made later."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util
from tqdm import tqdm

from vcm_jax import ema
from vcm_jax.atomic import atomic_path
from vcm_jax.runs.checkpoint import CheckpointError, Saver, existing_step, open_manager, readable


def open_snapshots(workdir, read_only: bool = False):
    """The snapshots of a run's averages, under WORKDIR/snapshots; all of them stay."""
    options = ocp.CheckpointManagerOptions(
        cleanup_tmp_directories=not read_only,
        read_only=read_only,
        multiprocessing_options=ocp.options.MultiprocessingOptions(
            barrier_sync_key_prefix="snapshots"
        ),
    )
    directory = Path(workdir).absolute() / "snapshots"
    handlers = {"state": ocp.PyTreeCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
    return ocp.CheckpointManager(directory, options=options, item_handlers=handlers)


def save_snapshot(saver: Saver, state) -> None:
    """Keeps the averages for `reconstruct`, as float16 like EDM2's, half of what they take."""
    saver.save(int(state.step), {"ema": _halved(state.ema), "stats": state.stats}, {})


@jax.jit
def _halved(averages):
    return jax.tree.map(lambda a: a.astype(jnp.float16), averages)


def restore_weights(workdir, step: int | None = None, sigma_rel: float | None = None):
    """The averaged weights of a run, as the network's variables, on the host.

    Args:
      workdir: of the run.
      step: which checkpoint, the latest by default.
      sigma_rel: width of the average, the first that the run keeps by default; one that it does
        not keep can be made with `reconstruct`.

    Returns:
      `{"params": ..., "stats": ...}` of numpy arrays.

    Raises:
      CheckpointError: when there is no such checkpoint or average.
    """
    directory = Path(workdir) / "checkpoints"
    if not directory.is_dir():
        raise CheckpointError(f"{workdir}: no checkpoints there (the workdir of a run is wanted)")
    with open_manager(workdir, read_only=True) as manager:
        made = None if sigma_rel is None else _reconstructed(workdir, sigma_rel, step)
        at = manager.latest_step() if step is None else step
        if made and not (at in manager.all_steps() and f"{sigma_rel:g}" in _widths(manager, at)):
            with np.load(made) as arrays:
                return traverse_util.unflatten_dict(dict(arrays), sep="/")
        step = existing_step(manager, step)
        widths = _widths(manager, step)
        width = widths[0] if sigma_rel is None else f"{sigma_rel:g}"
        if width not in widths:
            raise CheckpointError(
                f"{directory}/{step}: no average of sigma_rel {width}, only {', '.join(widths)} "
                "(python -m vcm_jax.reconstruct makes others)"
            )
        return _restore_average(manager, step, width)


def _widths(manager, step: int) -> list[str]:
    with readable(manager, step):
        return sorted(manager.item_metadata(step)["state"].tree["ema"], key=float)


def _restore_average(manager, step: int, width: str) -> dict:
    """{"params", "stats"} of one average, on the host: the devices may have changed."""
    tree = manager.item_metadata(step)["state"].tree
    wanted = {"ema": {width: tree["ema"][width]}, "stats": tree["stats"]}
    on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    args = ocp.args.Composite(
        state=ocp.args.PyTreeRestore(item=wanted, restore_args=on_host, partial_restore=True)
    )
    with readable(manager, step):
        restored = manager.restore(step, args=args)["state"]
    return {"params": restored["ema"][width], "stats": restored["stats"]}


def _reconstructed(workdir, sigma_rel: float, step: int | None) -> Path | None:
    """The file that `reconstruct` made, the latest step's by default; None where there is none."""
    found = {
        int(path.stem.split("_")[0]): path
        for path in (Path(workdir) / "averages").glob(f"*_{sigma_rel:g}.npz")
    }
    return found.get(max(found, default=None) if step is None else step)


def reconstruct(workdir, sigma_rel: float, step: int | None = None) -> Path:
    """Averaged weights of any width from a run's snapshots (EDM2 algorithm 3, post-hoc EMA).

    Args:
      workdir: of the run.
      sigma_rel: the width wanted.
      step: at which the average ends; one of the snapshots', the last by default.

    Returns:
      The file written, WORKDIR/averages/STEP_WIDTH.npz.

    Raises:
      CheckpointError: when there are no snapshots, or none of that step.
      ValueError: when no average is that wide.
    """
    if not (Path(workdir) / "snapshots").is_dir():
        raise CheckpointError(
            f"{workdir}: no snapshots there (config.snapshot_every says how often a run keeps them)"
        )
    with open_snapshots(workdir, read_only=True) as manager:
        step = existing_step(manager, step)
        snapshots = [
            (at, width)
            for at in sorted(manager.all_steps())
            if at <= step
            for width in _widths(manager, at)
        ]
        coefficients = ema.posthoc_coefficients(
            [at for at, _ in snapshots], [float(width) for _, width in snapshots], step, sigma_rel
        )
        total = None
        for (at, width), weight in zip(tqdm(snapshots, unit="snapshot"), coefficients):
            found = _restore_average(manager, at, width)
            term = jax.tree.map(lambda a, w=weight: w * a.astype(np.float64), found["params"])
            total = term if total is None else jax.tree.map(np.add, total, term)
    params = jax.tree.map(np.float32, total)
    arrays = traverse_util.flatten_dict({"params": params, "stats": found["stats"]}, sep="/")
    path = Path(workdir) / "averages" / f"{step}_{sigma_rel:g}.npz"
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)
    return path

"""EMA weights of a run: reading them, keeping snapshots of them, and other widths made later."""

import zipfile
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util
from tqdm import tqdm

from vcm_jax import ema
from vcm_jax.atomic import atomic_path
from vcm_jax.runs.checkpoint import (
    CheckpointError,
    DamagedError,
    Saver,
    check_values,
    existing_step,
    open_manager,
    read_meta,
    readable,
)


def open_snapshots(workdir, read_only: bool = False):
    """Orbax's manager of the snapshots under WORKDIR/snapshots, which are all kept."""
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
    """Saves the EMA weights for `reconstruct`, as float16, which halves them (as EDM2 does)."""
    saver.save(int(state.step), {"ema": _halved(state.ema), "stats": state.stats}, {})


@jax.jit
def _halved(averages):
    return jax.tree.map(lambda a: a.astype(jnp.float16), averages)


def restore_weights(workdir, step: int | None = None, sigma_rel: float | None = None):
    """The EMA weights of a run, as the network's variables, on the host.

    Args:
      workdir: of the run.
      step: which checkpoint, the latest by default.
      sigma_rel: relative width of the EMA, the first one of the run by default; one that the run
        does not keep can be made with `reconstruct`.

    Returns:
      `{"params": ..., "stats": ...}` of numpy arrays. Of a run with frozen parameters or an adapter
      that is what was trained; `vcm_jax.weights.read_run` adds the rest.

    Raises:
      CheckpointError: there is no such checkpoint, it has no EMA of this width, or it is damaged.
    """
    directory = Path(workdir) / "checkpoints"
    if not directory.is_dir():
        raise CheckpointError(f"{workdir}: no checkpoints there (the workdir of a run is wanted)")
    with open_manager(workdir, read_only=True) as manager:
        made = None if sigma_rel is None else _reconstructed(workdir, sigma_rel, step)
        at = manager.latest_step() if step is None else step
        if made and not (at in manager.all_steps() and f"{sigma_rel:g}" in _widths(manager, at)):
            return _read_reconstructed(made)
        step = existing_step(manager, step)
        widths = _widths(manager, step)
        width = widths[0] if sigma_rel is None else f"{sigma_rel:g}"
        if width not in widths:
            raise CheckpointError(
                f"{directory}/{step}: no EMA of sigma_rel {width}, only {', '.join(widths)} "
                "(python -m vcm_jax.reconstruct makes others)"
            )
        return _restore_average(manager, step, width)


def imported_model(folder) -> str | None:
    """The name of the network that imported weights belong to; None for anything else.

    Args:
      folder: of `vcm_jax.interop.import_torch network`.
    """
    if not (Path(folder) / "checkpoints").is_dir():
        return None
    with open_manager(folder, read_only=True) as manager:
        return read_meta(manager, existing_step(manager, None)).get("model")


def _widths(manager, step: int) -> list[str]:
    with readable(manager, step):
        return sorted(manager.item_metadata(step)["state"].tree["ema"], key=float)


def _restore_average(manager, step: int, width: str) -> dict:
    """{"params", "stats"} of one EMA, on the host: the devices may have changed."""
    with readable(manager, step):
        tree = manager.item_metadata(step)["state"].tree
    wanted = {"ema": {width: tree["ema"][width]}, "stats": tree["stats"]}
    on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    args = ocp.args.Composite(
        state=ocp.args.PyTreeRestore(item=wanted, restore_args=on_host, partial_restore=True)
    )
    with readable(manager, step):
        restored = manager.restore(step, args=args)["state"]
    check_values(restored, read_meta(manager, step), manager, step)
    return {"params": restored["ema"][width], "stats": restored["stats"]}


def _read_reconstructed(path: Path) -> dict:
    """The variables in a file of `reconstruct`; zip files have checksums of their contents."""
    try:
        with np.load(path) as arrays:
            return traverse_util.unflatten_dict(dict(arrays), sep="/")
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error, KeyError) as error:
        raise DamagedError(
            f"{path} is damaged ({error}): delete it, and make it again with vcm_jax.reconstruct"
        ) from error


def _reconstructed(workdir, sigma_rel: float, step: int | None) -> Path | None:
    """The file that `reconstruct` made, the latest step's by default; None where there is none."""
    found = {
        int(path.stem.split("_")[0]): path
        for path in (Path(workdir) / "averages").glob(f"*_{sigma_rel:g}.npz")
    }
    return found.get(max(found, default=None) if step is None else step)


def reconstruct(workdir, sigma_rel: float, step: int | None = None) -> Path:
    """Makes EMA weights of any width from the snapshots of a run (post-hoc EMA, EDM2 algorithm 3).

    Args:
      workdir: of the run.
      sigma_rel: the width wanted.
      step: the training step at which the EMA ends; one of the snapshots', the last by default.

    Returns:
      The file written, WORKDIR/averages/STEP_WIDTH.npz.

    Raises:
      CheckpointError: there are no snapshots, or none of that step, or one is damaged.
      ValueError: no EMA can be that wide.
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

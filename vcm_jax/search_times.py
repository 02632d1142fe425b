"""Searches the best N sampling times of a trained run.

    python -m vcm_jax.search_times --workdir=RUN --steps=4
    python -m vcm_jax.search_times --workdir=RUN --steps=2 --records=RECORDS --clips=64
    python -m vcm_jax.search_times --workdir=RUN --steps=8 --guidance_scale=4.5

It prints the times, for `vcm_jax.generate --times=...`, and how much closer to the finest
trajectory they come than equal steps.

The run's sampler takes the steps of a fine grid of times, under the conditions of some records.
From every point of that trajectory every jump of the grid is tried once. Dynamic programming then
finds the chain of N jumps with the least sum of errors. The idea is that of BOSS (Nguyen et al.
2024), which searches the steps of an Euler sampler; here a jump is the trained network's own. The
gain is measured on the clips and the noise of the search.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from vcm_jax import sampling
from vcm_jax.cli import define_run_flags, run
from vcm_jax.generation.run import load_run
from vcm_jax.models import MMDiT
from vcm_jax.models.conditioned import encode_features
from vcm_jax.records import mixture
from vcm_jax.records.source import RecordSource, locate
from vcm_jax.runs import description


def best_path(errors: np.ndarray, num_steps: int) -> list[int]:
    """The chain of `num_steps` jumps from the first to the last grid point with the least error.

    Args:
      errors: `G G`; errors[i, j] is that of the jump from point i to point j > i. Entries with
        j <= i are not used.
      num_steps: at most G - 1.

    Returns:
      Indices of `num_steps + 1` grid points.

    Raises:
      ValueError: the grid has fewer intervals than `num_steps`.
    """
    size = len(errors)
    if not 1 <= num_steps < size:
        raise ValueError(f"{num_steps} steps do not fit a grid of {size - 1} intervals")
    cost = np.full((num_steps + 1, size), np.inf)
    before = np.zeros((num_steps + 1, size), int)
    cost[0, 0] = 0
    for n in range(1, num_steps + 1):
        for j in range(n, size):
            through = cost[n - 1, :j] + errors[:j, j]
            before[n, j] = np.argmin(through)
            cost[n, j] = through[before[n, j]]
    path = [size - 1]
    for n in range(num_steps, 0, -1):
        path.append(int(before[n, path[-1]]))
    return path[::-1]


def jump_errors(u, x1, grid, cond):
    """(errors `G G`, trajectory `G B N C`) of every jump on a grid of times.

    The trajectory takes the grid's own steps. errors[i, j] is the distance between the result of
    one jump from the trajectory's point i and its point j: the root mean square over a clip, then
    the mean over clips. It is NaN for j <= i.

    Args:
      u: `u(x, t, s, cond)`.
      x1: noise `B N C`.
      grid: decreasing times, `G`.
      cond: the condition that u takes.
    """
    grid = np.asarray(grid, np.float32)
    jump = jax.jit(functools.partial(sampling.jump, u))
    points = [x1]
    for t, s in zip(grid[:-1], grid[1:]):
        points.append(jump(points[-1], t, s, cond))
    errors = np.full((len(grid), len(grid)), np.nan)
    for i, t in enumerate(grid):
        for j in range(i + 1, len(grid)):
            difference = jump(points[i], t, grid[j], cond) - points[j]
            errors[i, j] = jnp.sqrt(jnp.square(difference).mean((1, 2))).mean()
    return errors, jnp.stack(points)


def search(u, x1, cond, num_steps: int, grid_size: int):
    """The best times, and how far they and equal steps end from the finest trajectory.

    Returns:
      Times `num_steps + 1`, and the root mean square distances (of these times, of equal steps).
    """
    grid = sampling.uniform_times(grid_size)
    errors, points = jump_errors(u, x1, grid, cond)
    times = grid[best_path(errors, num_steps)]

    def distance(times):
        found = jax.jit(lambda x: sampling.sample(u, x, times, cond))(x1)
        return float(jnp.sqrt(jnp.square(found - points[-1]).mean((1, 2))).mean())

    return times, (distance(times), distance(sampling.uniform_times(num_steps)))


def run_velocity(run, records: RecordSource, num_clips: int):
    """(u, cond) of a run under the conditions of some records.

    Raises:
      ValueError: when the records are too few, or not such as the run takes.
    """
    manifest, model = records.manifest, run.model
    if (manifest.sequence, dict(manifest.encoders)) != (run.sequence, dict(run.encoder_spec)):
        raise ValueError(f"{records.path}: other lengths or encoders than the run was trained with")
    if len(records) < num_clips:
        raise ValueError(f"{records.path} has {len(records)} records, {num_clips} are wanted")
    shapes = mixture.Shapes(
        clip=(model.clip_seq_len, model.clip_dim), sync=(model.sync_seq_len, model.sync_dim)
    )
    mixed = mixture.mix([records], [1.0], seed=0)
    (batch,) = mixture.batches(mixed, shapes, batch_size=num_clips, first_step=0, last_step=1)
    guidance = run.sampler.guidance_input(run.objective)
    net, cond, null_cond = encode_features(MMDiT(model), run.variables, batch, guidance)
    return run.sampler.velocity(run.objective, net, null_cond), cond


def records_of(workdir) -> RecordSource:
    """The records that a run is validated on or, if there are none, trained on."""
    data = description.read(workdir).config["data"]
    path, _ = mixture.parse_source((data["val_sources"] or data["sources"])[0])
    return RecordSource(locate(path, data["dir"]))


def define_flags():
    define_run_flags()
    flags.DEFINE_string("records", "", "Records whose conditions are used (the run's own).")
    flags.DEFINE_integer("steps", 4, "Steps of the sampler.", lower_bound=1)
    flags.DEFINE_integer("grid", 32, "Number of equal intervals of the time grid.", 2, 1000)
    flags.DEFINE_integer("clips", 16, "Number of records.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Seed of the noise, any integer.")
    flags.DEFINE_float("guidance_scale", None, "As in vcm_jax.generate.")


def main(args):
    if args.steps >= args.grid:
        raise ValueError(f"--steps={args.steps} must be less than --grid={args.grid}")
    loaded = load_run(args.workdir, args.checkpoint, with_encoders=False)
    loaded = dataclasses.replace(loaded, sampler=sampling.Sampler(args.guidance_scale))
    if loaded.sampler.restarts(loaded.objective):
        raise ValueError(
            f"{args.workdir}: {loaded.objective.name} restarts from fresh noise after every step: "
            "there is no trajectory to search"
        )
    records = RecordSource(Path(args.records)) if args.records else records_of(args.workdir)
    u, cond = run_velocity(loaded, records, args.clips)
    shape = (args.clips, loaded.model.latent_seq_len, loaded.model.latent_dim)
    x1 = np.random.default_rng(args.seed % 2**64).standard_normal(shape, np.float32)
    times, (found, equal) = search(u, x1, cond, args.steps, args.grid)
    print(f"--times={','.join(f'{time:g}' for time in times)}")
    print(
        f"distance to {args.grid} steps (root mean square over {args.clips} clips): "
        f"{found:.4f}, equal steps {equal:.4f}: {100 * (found / equal - 1):+.1f}%"
    )


if __name__ == "__main__":
    run(main, define_flags, memory_hint="lower --clips")

"""EMA weights of any width, from the snapshots that a run keeps.

    python -m vcm_jax.reconstruct --workdir=RUN --sigma_rel=0.03 [--step=200000]

Afterwards `python -m vcm_jax.generate --workdir=RUN --sigma_rel=0.03` uses them.
"""

import sys

from absl import app, flags

from vcm_jax.cli import show_ours
from vcm_jax.runs.checkpoint import reconstruct


def _define_flags():
    flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
    flags.DEFINE_float("sigma_rel", None, "Relative width of the EMA.", required=True)
    flags.DEFINE_integer("step", None, "Training step at which the EMA ends (the last snapshot).")


def main(argv):
    if argv[1:]:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    show_ours()
    args = flags.FLAGS
    try:
        path = reconstruct(args.workdir, args.sigma_rel, args.step)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(
        f"{path}: use it with vcm_jax.generate --workdir={args.workdir} "
        f"--sigma_rel={args.sigma_rel:g} --checkpoint={path.stem.split('_')[0]}"
    )


if __name__ == "__main__":
    _define_flags()
    app.run(main)

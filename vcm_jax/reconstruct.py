"""EMA weights of any width, from the snapshots that a run keeps.

    python -m vcm_jax.reconstruct --workdir=RUN --sigma_rel=0.03
    python -m vcm_jax.reconstruct --workdir=RUN --sigma_rel=0.03 --step=200000

Afterwards generation uses them:

    python -m vcm_jax.generate --workdir=RUN --sigma_rel=0.03 --video=CLIP.mp4 --out=OUT.mp4
"""

from absl import flags

from vcm_jax.cli import run
from vcm_jax.runs.averages import reconstruct


def define_flags():
    flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
    flags.DEFINE_float("sigma_rel", None, "Relative width of the EMA.", required=True)
    flags.DEFINE_integer("step", None, "Training step at which the EMA ends (the last snapshot).")


def main(args):
    path = reconstruct(args.workdir, args.sigma_rel, args.step)
    print(
        f"{path}: use it with vcm_jax.generate --workdir={args.workdir} "
        f"--sigma_rel={args.sigma_rel:g} --checkpoint={path.stem.split('_')[0]}"
    )


if __name__ == "__main__":
    run(main, define_flags)

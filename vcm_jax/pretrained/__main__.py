"""Public weights by name: MMAudio's networks with the codec and the encoders that they need.

    python -m vcm_jax.pretrained list
    python -m vcm_jax.pretrained fetch mmaudio_large_44k_v2 [--out=DIR]
    python -m vcm_jax.pretrained verify mmaudio_large_44k_v2

`verify` takes a folder of weights, too.
"""

from absl import flags

from vcm_jax import pretrained
from vcm_jax.cli import run
from vcm_jax.pretrained.convert import components
from vcm_jax.pretrained.downloads import gigabytes
from vcm_jax.pretrained.files import default_root, locate_all, missing
from vcm_jax.pretrained.table import PUBLIC_MODELS


def define_flags() -> None:
    flags.DEFINE_string(
        "out", None, "fetch: folder for the files, laid out as MMAudio's own (default: caches)."
    )


def _list() -> None:
    root = default_root()
    for name, public in PUBLIC_MODELS.items():
        absent = missing(public.files, locate_all(public.files, root))
        size = sum(file.size for file in public.files)
        here = f"{gigabytes(sum(f.size for f in absent))} to fetch" if absent else "here"
        rate = public.sequence.sample_rate
        made = all(
            (root / pretrained.CONVERTED / component.name).is_dir()
            for component in components(public, name).values()
        )
        print(
            f"{name:22} {rate:6} Hz  {gigabytes(size):>8}  {public.network.licence}  "
            f"{here}{', converted' if made else ''}"
        )


def _fetch(name: str, out: str | None) -> None:
    folder = pretrained.fetch(name, out)
    use = folder if out else name
    print(f"{folder}: {name} is complete; use it with vcm_jax.generate --model={use}")


def _verify(name: str) -> None:
    findings = pretrained.verify(name)
    for what, finding, _ in findings:
        print(f"{what}: {finding}")
    if not all(good for _, _, good in findings):
        raise pretrained.PretrainedError(f"{name} is damaged; see above")


def main(args, rest: list[str]) -> None:
    """Runs the command that the arguments name."""
    command, *names = rest or [""]
    wanted = {"list": 0, "fetch": 1, "verify": 1}
    if command not in wanted or len(names) != wanted[command]:
        raise ValueError("give list, fetch NAME, or verify NAME")
    if args.out and command != "fetch":
        raise ValueError(f"--out belongs to fetch, not to {command}")
    if command == "list":
        _list()
    elif command == "fetch":
        _fetch(names[0], args.out)
    else:
        _verify(names[0])


if __name__ == "__main__":
    run(main, define_flags, positional="list, fetch NAME, or verify NAME")

"""Converts PyTorch weights and features, once.

    python -m vcm_jax.interop.import_torch codec --vae=v1-16.pth --vocoder=best_netG.pt --out=DIR
    python -m vcm_jax.interop.import_torch network mmaudio_small_16k.pth --out=DIR
    python -m vcm_jax.interop.import_torch features MEMMAPS --tsv=FILE --codec=DIR \\
        --empty_text=mmaudio_small_16k.pth --out=RECORDS

codec: MMAudio's VAE and a BigVGAN vocoder become a codec folder.
network: MMAudio's network (version 1 or 2), or a file of `export_torch`, becomes weights that
training starts from (`--config.init_from=DIR`).
features: MMAudio's memory-mapped features become a records folder.
"""

import dataclasses
from collections.abc import Callable

from absl import flags

from vcm_jax.cli import run
from vcm_jax.interop import import_codec, import_features, import_network

POSITIONAL = "codec, network FILE, or features FOLDER"


@dataclasses.dataclass(frozen=True)
class _Conversion:
    """One kind of conversion.

    Attributes:
      convert: takes the positional argument, if there is one, and the flags by their names; returns
        an exit code, or None for 0.
      argument: what the positional argument after the kind is; "" if there is none.
      required, optional: names of its flags.
    """

    convert: Callable[..., int | None]
    argument: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()


_CONVERSIONS = {
    "codec": _Conversion(import_codec.convert, "", ("vae", "vocoder", "out")),
    "network": _Conversion(import_network.convert, "FILE", ("out",)),
    "features": _Conversion(
        import_features.convert, "FOLDER", ("tsv", "codec", "empty_text", "out"), ("duration",)
    ),
}


def define_flags() -> None:
    flags.DEFINE_string("out", None, "Folder to write: a codec, weights or records.")
    flags.DEFINE_string("vae", None, "codec: v1-16.pth or v1-44.pth.")
    flags.DEFINE_string("vocoder", None, "codec: best_netG.pt or bigvgan_generator.pt.")
    flags.DEFINE_string("tsv", None, "features: id and label or caption, in the order of the rows.")
    flags.DEFINE_string("codec", None, "features: folder of the codec that made the latents.")
    flags.DEFINE_string(
        "empty_text", None, 'features: the text features of "", in MMAudio\'s weights or a .npy.'
    )
    flags.DEFINE_float("duration", None, "features: seconds of each clip (8).")


def main(args, rest: list[str]) -> int | None:
    kind, *files = rest or [""]
    if kind not in _CONVERSIONS:
        raise ValueError(f"{kind!r} cannot be imported: give {POSITIONAL}")
    conversion = _CONVERSIONS[kind]
    if len(files) != bool(conversion.argument):
        usage = f"{kind} {conversion.argument}".strip()
        raise ValueError(f"{' '.join(rest)}: give `{usage}` and flags")
    known = conversion.required + conversion.optional
    every = {name for other in _CONVERSIONS.values() for name in other.required + other.optional}
    given = {name: getattr(args, name) for name in every if getattr(args, name) is not None}
    if missing := [f"--{name}" for name in conversion.required if not given.get(name)]:
        raise ValueError(f"{kind} needs {', '.join(missing)}")
    if foreign := sorted(given.keys() - set(known)):
        raise ValueError(f"{kind} takes no --{foreign[0]}")
    return conversion.convert(*files, **given)


if __name__ == "__main__":
    run(main, define_flags, positional=POSITIONAL)

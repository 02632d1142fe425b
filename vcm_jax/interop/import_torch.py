"""PyTorch weights and features in, once:

    python -m vcm_jax.interop.import_torch codec --vae=v1-16.pth --vocoder=best_netG.pt --out=DIR
    python -m vcm_jax.interop.import_torch network mmaudio_small_16k.pth --out=DIR
    python -m vcm_jax.interop.import_torch features MEMMAPS --tsv=FILE --codec=DIR \\
        --empty_text=mmaudio_small_16k.pth --out=RECORDS

Every subcommand has --help.
"""

import argparse
import sys

from vcm_jax.interop import import_codec, import_features, import_network

# Modules with add_arguments(parser) and run(args).
_COMMANDS = {"codec": import_codec, "network": import_network, "features": import_features}


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m vcm_jax.interop.import_torch",
        description="Converts PyTorch weights and features.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in _COMMANDS.items():
        summary = module.__doc__.splitlines()[0]
        module.add_arguments(commands.add_parser(name, help=summary, description=summary))
    args = parser.parse_args(argv)
    try:
        _COMMANDS[args.command].run(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

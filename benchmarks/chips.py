"""What training takes on slices of TPUs that are not there, as rows of a table.

    python benchmarks/chips.py                      # all rows; hours on a small machine
    python benchmarks/chips.py --only=small_16k/v5e:4x4
    python benchmarks/chips.py --times=3            # one row in three commands, for the spread

It needs `pip install "jax[tpu]"`, up to 10 GB of memory, and minutes for each row. A row is one
`python -m vcm_jax.main --dry_run`; docs/training.md explains what it prints. Seconds are those of
compiling, CPU seconds those of the whole command.
"""

import argparse
import os
import re
import resource
import subprocess
import sys

# (config, slice, batch, data, fsdp, remat). The number of devices is data x fsdp.
ROWS = [
    ("s16k", "v5e:4x4", 512, 16, 1, "none"),
    ("s16k", "v5e:8x8", 512, 64, 1, "none"),
    ("s16k", "v5p:2x2x4", 512, 16, 1, "none"),
    ("s16k", "v6e:8x8", 512, 64, 1, "none"),
    ("l16k", "v5e:4x4", 256, 4, 4, "products"),
    ("l16k", "v5e:8x8", 512, 16, 4, "products"),
    ("l16k", "v5p:2x2x4", 512, 16, 1, "none"),
    ("l16k", "v6e:8x8", 512, 16, 4, "none"),
    ("l44k", "v5e:4x4", 256, 4, 4, "products"),
    ("l44k", "v5e:4x4", 256, 1, 16, "products"),
    ("l44k", "v5e:8x8", 512, 16, 4, "products"),
    ("l44k", "v5p:2x2x4", 512, 16, 1, "none"),
    ("l44k", "v6e:8x8", 512, 16, 4, "none"),
]
MODELS = {"s16k": "small_16k", "l16k": "large_16k", "l44k": "large_44k"}
HEADER = (
    "| network | slice | batch | data x fsdp | remat | GiB of a chip's | arguments | temporaries "
    "| code | collectives (MB per device and step) | TFLOP per step | with padding "
    "| seconds | CPU seconds |"
)


def compile_row(config, topology, batch, data, fsdp, remat) -> tuple[str, float]:
    """What the dry run printed, and its CPU seconds."""
    # Settings of this process must not change what is compiled, nor may an earlier compilation.
    env = {
        k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
    }
    command = [
        *(sys.executable, "-m", "vcm_jax.main", f"--config={config}", "--workdir=none"),
        *("--dry_run", f"--config.topology={topology}", f"--config.batch_size={batch}"),
        *(f"--config.mesh.data={data}", f"--config.mesh.fsdp={fsdp}", f"--config.remat={remat}"),
        "--config.data.sources=()",
    ]
    before = cpu_seconds()
    done = subprocess.run(
        command, capture_output=True, text=True, env=env | {"JAX_PLATFORMS": "cpu"}
    )
    if "memory per device: " not in done.stdout:
        sys.exit(done.stderr[-2000:])
    return done.stdout, cpu_seconds() - before


def cpu_seconds() -> float:
    """CPU seconds of all commands that have ended, of the user and of the system."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def row(text: str, cpu: float, config, topology, batch, data, fsdp, remat) -> str:
    """A row of the table from what a dry run printed and its CPU seconds."""
    size = r"([\d.]+)"
    memory = re.search(rf"memory per device: .*?{size} GiB of {size} GiB \((.*)\)", text)
    parts = re.findall(rf"{size} GiB", memory[3])
    parts = ["", "", *parts][-3:]
    collectives = re.findall(rf"^  ([\w-]+) over ([\w ]+): {size} MB", text, re.MULTILINE)
    moved = ", ".join(f"{kind} {axes} {number}" for kind, axes, number in collectives)
    flops = re.search(rf"take {size} T per step(?:, {size} T)?", text)
    seconds = re.search(r"compiled in (\d+) s", text)
    cells = [
        *(MODELS[config], topology, str(batch), f"{data} x {fsdp}", remat),
        *(f"{memory[1]} of {memory[2]}", *parts, moved),
        *(cell or "" for cell in (flops.groups() if flops else (None, None))),
        *((seconds[1], f"{cpu:.0f}") if seconds else ("refused", "")),
    ]
    return f"| {' | '.join(cells)} |"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="rows whose NETWORK/SLICE begins like this")
    parser.add_argument("--times", type=int, default=1, help="how often each row is compiled")
    args = parser.parse_args()
    print(HEADER, "|" + "---|" * HEADER[1:].count("|"), sep="\n", flush=True)
    for settings in ROWS:
        if f"{MODELS[settings[0]]}/{settings[1]}".startswith(args.only):
            for _ in range(args.times):
                print(row(*compile_row(*settings), *settings), flush=True)


if __name__ == "__main__":
    main()

"""The cost of a run besides its steps, as JSON lines: memory of the state, logging, checkpoints.

    python benchmarks/run_costs.py --model=small_16k
    python benchmarks/run_costs.py --model=small_16k --save

The state is sharded over simulated devices and is not allocated. `--save` also times checkpoints;
these hold the parameters alone, which are allocated.
"""

import argparse
import os
import tempfile
import time

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=64")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import harness
import jax
import jax.numpy as jnp
import numpy as np

from vcm_jax.devices import sharding
from vcm_jax.models import MODELS, MMDiT
from vcm_jax.runs import checkpoint
from vcm_jax.training.state import OptimizerConfig, make_init, make_optimizer
from vcm_jax.training.writer import Writer

MESHES = ((1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 4, 1), (2, 2, 2), (1, 1, 8), (8, 8, 1), (1, 64, 1))


def state_of(model):
    """Shapes and dtypes of the train state of a network."""
    stats = {
        "latent_mean": jnp.zeros(model.latent_dim),
        "latent_std": jnp.ones(model.latent_dim),
        "empty_text": jnp.zeros((model.text_seq_len, model.text_dim)),
    }
    init = make_init(MMDiT(model), stats, make_optimizer(OptimizerConfig()), (0.05, 0.10))
    return jax.eval_shape(init, jax.random.key(0))


def memory(name: str) -> None:
    """Prints, for every mesh, how much of the state each device holds."""
    model = MODELS[name]
    abstract = state_of(model)
    for sizes in MESHES:
        devices = jax.devices()[: int(np.prod(sizes))]
        mesh = sharding.make_mesh(*sizes, devices=devices)
        shardings = sharding.state_shardings(abstract, mesh, model.num_heads)
        gib = {}
        for field in ("params", "opt_state", "ema"):
            held = sharding.device_bytes(getattr(abstract, field), getattr(shardings, field))
            gib[f"{field}_gib"] = held / 2**30
        harness.print_line(
            benchmark="state_memory",
            model=name,
            mesh="x".join(map(str, sizes)),
            gib_per_device=sum(gib.values()),
            **gib,
        )


def writing(rounds: int = 200) -> None:
    """Prints the time to write one log's scalars, and one sound of 8 s with its spectrogram."""
    values = {f"train/value_{i}": 1.0 / (i + 1) for i in range(36)}
    sound = np.random.default_rng(0).uniform(-0.1, 0.1, 8 * 16_000).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        writer, times = Writer(folder), {"log": [], "sound": []}
        for step in range(rounds):
            started = time.perf_counter()
            writer.scalars(step, values)
            times["log"].append(time.perf_counter() - started)
        for step in range(rounds // 10):
            started = time.perf_counter()
            writer.sound(step, "sound", sound, 16_000)
            times["sound"].append(time.perf_counter() - started)
        writer.close()
    harness.print_line(
        benchmark="writing",
        scalars=len(values),
        log_ms=1e3 * float(np.median(times["log"])),
        log_ms_worst=1e3 * max(times["log"]),
        sound_ms=1e3 * float(np.median(times["sound"])),
    )


def saving(name: str, rounds: int = 3) -> None:
    """Prints how long a checkpoint of the parameters blocks the loop, and takes to be on disk."""
    abstract = state_of(MODELS[name]).params
    params = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), abstract)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    blocked, whole = [], []
    with (
        tempfile.TemporaryDirectory() as folder,
        checkpoint.Saver(checkpoint.open_manager(folder)) as saver,
    ):
        for step in range(rounds):
            started = time.perf_counter()
            saver.save(step, params, {})
            blocked.append(time.perf_counter() - started)
            saver.manager.wait_until_finished()
            whole.append(time.perf_counter() - started)
    harness.print_line(
        benchmark="saving",
        model=name,
        gib=size / 2**30,
        loop_waits_s=min(blocked),
        loop_waits_s_worst=max(blocked),
        on_disk_s=min(whole),
        on_disk_s_worst=max(whole),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="small_16k", choices=list(MODELS))
    parser.add_argument("--save", action="store_true", help="also time checkpoints")
    args = parser.parse_args()
    memory(args.model)
    writing()
    if args.save:
        saving(args.model)


if __name__ == "__main__":
    main()

"""The cost of one training step, as one JSON line.

    python benchmarks/train_step.py --model=small_16k --batch=4
    python benchmarks/train_step.py --model=small_16k --batch=512 --dtype=bfloat16
    python benchmarks/train_step.py --model=small_16k --batch=64 --count_only

The step includes drawing latents, all forward passes, the backward pass, gradient clipping, AdamW
and two sets of EMA weights. `mfu` is model_gflop_per_sample x samples_per_s / (peak_tflops x
devices), where the peak is a matrix product measured in the same run. `xla_gflop_per_sample` is
XLA's own count.
"""

import argparse
import functools

import harness
import jax
import jax.numpy as jnp

from vcm_jax.devices import sharding
from vcm_jax.devices.layout import Layout
from vcm_jax.models import MODELS, MMDiT
from vcm_jax.models.flops import step_flops
from vcm_jax.objectives import OBJECTIVES, make_settings
from vcm_jax.training.rows import StepConfig, abstract_batch
from vcm_jax.training.state import OptimizerConfig, make_init, make_optimizer
from vcm_jax.training.step import train_step

# A teacher's passes are not part of the step.
STUDENTS = [name for name, objective in OBJECTIVES.items() if not objective.needs_teacher]


def prepare(model, batch_size: int, dtype, mesh, config: StepConfig):
    """The training step, as training compiles it.

    Returns:
      step: (state, batch, key) -> (state, metrics), jitted; the state is donated.
      init: key -> state, jitted.
      shapes: shapes and dtypes of the batch.
      put: a function that places (batch, key) on the mesh.
    """
    net, optimizer = MMDiT(model, dtype), make_optimizer(OptimizerConfig())
    stats = {
        "latent_mean": jnp.zeros(model.latent_dim),
        "latent_std": jnp.ones(model.latent_dim),
        "empty_text": jnp.zeros((model.text_seq_len, model.text_dim)),
    }
    has_target = config.objective.target_ema > 0
    init = make_init(net, stats, optimizer, (0.05, 0.10), has_target=has_target)
    abstract = jax.eval_shape(init, jax.random.key(0))
    shardings = sharding.state_shardings(abstract, mesh, model.num_heads)
    rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    step = functools.partial(
        train_step,
        net=net,
        optimizer=optimizer,
        config=config,
        layout=Layout(mesh, shardings.params),
    )
    step = jax.jit(
        step,
        in_shardings=(shardings, rows, whole),
        out_shardings=(shardings, whole),
        donate_argnums=0,
    )
    init = jax.jit(init, out_shardings=shardings)

    def put(batch, key):
        return jax.device_put(batch, rows), jax.device_put(key, whole)

    return step, init, abstract_batch(model, batch_size), put


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="small_16k", choices=list(MODELS))
    parser.add_argument("--batch", type=int, default=4, help="global batch size")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--mesh", default="-1,1,1", help="data,fsdp,tensor")
    parser.add_argument("--objective", default="vcm", choices=STUDENTS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--count_only", action="store_true", help="compile and count, do not run")
    args = parser.parse_args()

    model, dtype, config = (
        MODELS[args.model],
        jnp.dtype(args.dtype),
        StepConfig(steps=300_000, objective=make_settings(args.objective)),
    )
    mesh = sharding.make_mesh(*map(int, args.mesh.split(",")))
    sharding.check_batch_size(args.batch, mesh)
    step, init, shapes, put = prepare(model, args.batch, dtype, mesh, config)
    key = jax.random.key(0)
    step, compile_s = harness.compiled(step, jax.eval_shape(init, key), shapes, key)
    memory = step.memory_analysis()
    xla_gflop = harness.xla_flops(step) / args.batch / 1e9
    model_gflop = step_flops(model, config.objective.passes()) / 1e9
    results = {
        "benchmark": "train_step",
        "model": args.model,
        "batch": args.batch,
        "dtype": args.dtype,
        "mesh": args.mesh,
        "objective": args.objective,
        "compile_s": compile_s,
        "model_gflop_per_sample": model_gflop,
        "xla_gflop_per_sample": xla_gflop,
        "state_bytes_per_device": memory.argument_size_in_bytes,
        "temporary_bytes_per_device": memory.temp_size_in_bytes,
    }
    if not args.count_only:
        state, batch, key = init(key), *put(harness.random_like(shapes), key)

        def call():
            nonlocal state
            state, metrics = step(state, batch, key)
            return metrics

        results |= harness.timed(call, args.repeats, warmup=2)
        rate = args.batch / results["ms_min"] * 1e3
        peak = harness.peak_tflops(dtype)
        results |= {
            "samples_per_s": rate,
            "peak_tflops": peak,
            "mfu": model_gflop * rate / 1e3 / (peak * len(jax.devices())),
            "peak_memory_bytes": harness.peak_memory_bytes(),
        }
    harness.print_line(**results)


if __name__ == "__main__":
    main()

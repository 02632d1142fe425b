"""What a run would take: the dry run of training."""

import jax
import numpy as np
from clu import parameter_overview

from vcm_jax.devices import sharding
from vcm_jax.training import monitor


def describe(compiled, flops: float, abstract, shardings, batch, mesh) -> str:
    """Parameters, memory of each device, FLOPs and input bandwidth, from the compiled step.

    Args:
      compiled: the training step.
      flops: model FLOPs a sample.
      abstract, shardings: of the state.
      batch: shapes of the global batch.
      mesh: the devices.
    """
    devices, batch_size = mesh.devices.size, len(batch["latent_mean"])
    gib = lambda size: f"{size / 2**30:.3f} GiB"
    nbytes = lambda tree: sum(
        int(np.prod(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree)
    )
    held = {
        name: sharding.device_bytes(getattr(abstract, name), getattr(shardings, name))
        for name in ("params", "opt_state", "ema")
    }
    memory = compiled.memory_analysis()
    step_flops = flops * batch_size
    kind = jax.devices()[0].device_kind
    lines = [
        parameter_overview.get_parameter_overview(abstract.params, include_stats=False),
        f"mesh: {dict(mesh.shape)}, {devices} devices ({kind}), {jax.process_count()} processes",
        f"state of a device: {gib(sum(held.values()))} of {gib(nbytes(abstract))} in all: "
        + ", ".join(f"{name} {gib(size)}" for name, size in held.items()),
        f"activations and other temporaries of a device: {gib(memory.temp_size_in_bytes)} "
        f"(batch {batch_size}, {batch_size / devices:g} rows a device)",
        f"model FLOPs: {flops / 1e9:.4g} G a sample, {step_flops / 1e12:.4g} T a step; "
        f"XLA counts {monitor.xla_flops(compiled) / 1e12:.4g} T a step",
        f"input: {nbytes(batch) / batch_size / 2**10:.1f} KiB a sample, "
        f"{nbytes(batch) / 1e6:.4g} MB a step",
    ]
    peak = next((p for name, p in monitor.PEAK_TFLOPS.items() if kind.startswith(name)), None)
    rate = 0.4 * peak * 1e12 * devices / flops if peak else 1000.0
    at = f"at an MFU of 40% of {peak} TFLOP/s: " if peak else "at "
    bandwidth = rate * nbytes(batch) / batch_size / 1e9
    lines.append(f"{at}{rate:.4g} samples/s, which read {bandwidth:.3g} GB/s")
    return "\n".join(lines)

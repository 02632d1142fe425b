"""Where the time of a VCM training step goes: a table by kind of work, and a JSON line.

    python benchmarks/account.py --model=small_16k --batch=4

Every kind of matrix product is timed alone at its real shapes, forward and with its gradients, and
counted as often as the step needs it (see `step_flops`). The optimizer and the EMA weights are
timed on trees of the real size. The rest of the step is elementwise work: norms, rotary embedding,
gates, casts of the softmax, copies.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax

from vcm_jax import ema
from vcm_jax.interop.weights import abstract_variables
from vcm_jax.models import MODELS
from vcm_jax.models.convolution import conv1d
from vcm_jax.models.layers import attention
from vcm_jax.objectives.vcm import VCMConfig
from vcm_jax.training.state import OptimizerConfig, make_optimizer


@dataclasses.dataclass(frozen=True)
class Product:
    """One kind of matrix product.

    Attributes:
      layers: the layers that it belongs to.
      function: computes it.
      shapes: of its arguments.
      calls: how often a pass computes it.
    """

    layers: str
    function: object
    shapes: tuple
    calls: int

    def flops(self) -> float:
        """Operations of one forward call."""
        if self.function is attention:
            (batch, queries, heads, width), keys = self.shapes[0], self.shapes[1][1]
            return 4.0 * batch * queries * keys * heads * width
        (*rows, _), kernel = self.shapes
        return 2.0 * np.prod(rows) * np.prod(kernel)


def dense(x, kernel):
    return x @ kernel


def products(c, batch: int) -> list[Product]:
    """The matrix products of one forward pass."""
    found = []
    width, inner, joint = c.hidden_dim, c.mlp_dim, c.joint_depth
    latent, clip, text, sync = c.latent_seq_len, c.clip_seq_len, c.text_seq_len, c.sync_seq_len

    def add(layers, rows, inputs, outputs, kernel=1, calls=1):
        if kernel == 1:
            shapes, function = ((batch, rows, inputs), (inputs, outputs)), dense
        else:
            shapes, function = ((batch, rows, inputs), (kernel, inputs, outputs)), conv1d
        found.append(Product(layers, function, shapes, calls))

    def mlp(layers, rows, kernel, calls=1):
        add(layers, rows, width, inner, kernel, 2 * calls)
        add(layers, rows, inner, width, kernel, calls)

    def attend(queries, keys, calls):
        query = (batch, queries, c.num_heads, c.head_dim)
        key = (batch, keys, c.num_heads, c.head_dim)
        found.append(Product("attention", attention, (query, key, key), calls))

    add("conditions", clip, c.clip_dim, width)
    mlp("conditions", clip, 3)
    add("conditions", sync, c.sync_dim, width, 7)
    mlp("conditions", sync, 3)
    add("conditions", text, c.text_dim, width)
    mlp("conditions", text, 1)
    add("audio projector", latent, c.latent_dim, width, 7)
    mlp("audio projector", latent, c.audio_kernel)
    tokens = latent + clip + text
    attend(tokens, tokens, joint - 1)
    attend(latent, tokens, 1)
    attend(latent, latent, c.fused_depth)
    add("adaLN", sync, width, 6 * width, calls=c.depth)
    add("projections", tokens, width, 3 * width, calls=joint)
    add("projections", latent, width, 3 * width, calls=c.fused_depth)
    add("projections", text, width, width, calls=joint - 1)
    mlp("projections", text, 1, joint - 1)
    for rows, calls in ((latent, c.depth), (clip, joint - 1)):
        add("convolutions", rows, width, width, 3, calls)
        mlp("convolutions", rows, 3, calls)
    add("convolutions", latent, width, c.latent_dim, 7)
    return [product for product in found if product.calls]


def passes(layers: str, later: float) -> tuple[float, float]:
    """(forward passes without gradient, passes with gradient) of some layers, see `step_flops`."""
    return {"conditions": (0, 1), "audio projector": (later, 1)}.get(layers, (1 + 2 * later, 1))


def time_products(config, batch, dtype, repeats, later) -> dict[str, dict]:
    """{layers: milliseconds and GFLOP of their matrix products in a step}."""
    costs = {}
    for product in products(config, batch):
        shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape in product.shapes]
        args = jax.device_put(harness.random_like(shapes))
        forward = jax.jit(product.function)
        out = jax.jit(lambda *a, f=product.function: jax.vjp(f, *a[1:])[1](a[0]))
        cotangent = jnp.ones(jax.eval_shape(product.function, *args).shape, dtype)
        ahead = harness.timed(lambda f=forward, a=args: f(*a), repeats)["ms_min"]
        # The vjp of a product does not need its value, so that this is the backward pass alone
        # (except for attention, which recomputes its probabilities).
        back = harness.timed(lambda f=out, a=args, c=cotangent: f(c, *a), repeats)["ms_min"]
        forwards, trained = passes(product.layers, later)
        entry = costs.setdefault(product.layers, {"ms": 0.0, "gflop": 0.0})
        entry["ms"] += product.calls * ((forwards + trained) * ahead + trained * back)
        entry["gflop"] += product.calls * (forwards + 3 * trained) * product.flops() / 1e9
    return costs


def time_update(config, repeats) -> dict[str, dict]:
    """{work: milliseconds} of the optimizer with clipping, and of two sets of EMA weights."""
    params = jax.tree.map(lambda a: jnp.ones(a.shape), abstract_variables(config)["params"])
    optimizer = make_optimizer(OptimizerConfig())

    def update(params, state):
        updates, state = optimizer.update(params, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    run = jax.jit(update, donate_argnums=1)

    def optimise():
        nonlocal state
        new, state = run(params, state)
        return new

    update_ema = jax.jit(lambda a, p: ema.update(a, p, 10, 10.0), donate_argnums=0)
    weights = jax.tree.map(jnp.copy, params)

    def average():
        nonlocal weights
        weights = update_ema(weights, params)
        return weights

    found = {"optimizer": harness.timed(optimise, repeats)["ms_min"]}
    found["EMA weights"] = 2 * harness.timed(average, repeats)["ms_min"]
    return {work: {"ms": ms, "gflop": 0.0} for work, ms in found.items()}


def time_step(args) -> dict:
    """The whole step, in a process of its own, since it needs the memory."""
    command = [sys.executable, Path(__file__).with_name("train_step.py")]
    command += [f"--{key}={getattr(args, key)}" for key in ("model", "batch", "dtype", "repeats")]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="small_16k", choices=list(MODELS))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    config, dtype = MODELS[args.model], jnp.dtype(args.dtype)
    step = time_step(args)
    later = 1 - VCMConfig().instant_ratio
    costs = time_products(config, args.batch, dtype, args.repeats, later)
    costs |= time_update(config, args.repeats)
    rest = step["ms_min"] - sum(cost["ms"] for cost in costs.values())
    costs["elementwise and the rest"] = {"ms": rest, "gflop": 0.0}
    peak = step["peak_tflops"]
    print(f"{'work':26}{'ms':>9}{'% of step':>11}{'GFLOP':>9}{'% of peak':>11}")
    for name, cost in costs.items():
        rate = cost["gflop"] / cost["ms"] / peak
        shown = f"{100 * rate:11.0f}" if cost["gflop"] else ""
        share = 100 * cost["ms"] / step["ms_min"]
        print(f"{name:26}{cost['ms']:9.1f}{share:11.1f}{cost['gflop']:9.1f}{shown}")
    harness.print_line(
        benchmark="account",
        model=args.model,
        batch=args.batch,
        dtype=args.dtype,
        step_ms=step["ms_min"],
        peak_tflops=peak,
        parts=costs,
    )


if __name__ == "__main__":
    main()

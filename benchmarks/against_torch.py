"""The same work in JAX and in PyTorch on the same machine, and the ratios of the fastest runs.

    python benchmarks/against_torch.py --model=small_16k --batch=4

The work is a forward pass, a forward and a backward pass, and the whole VCM step (losses, backward
pass, gradient clipping, AdamW, two sets of EMA weights). The step is compared with PyTorch arranged
the same way, and with the naive arrangement, in which every row pays for four forward passes. Each
timing has a process of its own, and the two libraries take turns: in one process their thread pools
would slow each other down.
"""

import argparse
import json
import subprocess
import sys
import time

WORKS = ("forward", "forward_backward", "step", "step_naive")  # the last one in PyTorch alone


def time_jax(args) -> list[float]:
    """Milliseconds of each repeat."""
    import functools

    import harness
    import jax
    import jax.numpy as jnp
    import train_step

    from vcm_jax.devices import sharding
    from vcm_jax.models import MODELS, Conditions, MMDiT
    from vcm_jax.training.rows import StepConfig

    model, dtype = MODELS[args.model], jnp.dtype(args.dtype)
    mesh, config = sharding.make_mesh(), StepConfig(steps=300_000)
    step, init, shapes, put = train_step.prepare(model, args.batch, dtype, mesh, config)
    batch, key = put(harness.random_like(shapes), jax.random.key(0))
    state = init(key)
    if args.work == "step":

        def call():
            nonlocal state
            state, metrics = step(state, batch, key)
            return metrics

    else:
        x, times = batch["latent_mean"], jnp.linspace(0.1, 0.9, args.batch)
        cond = Conditions(batch["clip"], batch["sync"], batch["text"])
        params, stats = state.params, state.stats

        def forward(params, x, t, cond):
            return MMDiT(model, dtype).apply({"params": params, "stats": stats}, x, t, t / 2, cond)

        def loss(*arguments):
            return jnp.square(forward(*arguments)).mean()

        work = jax.jit(forward if args.work == "forward" else jax.grad(loss))
        call = functools.partial(work, params, x, times, cond)
    return harness.timings(call, args.repeats, warmup=2)


def torch_loss(model, x0, x1, t, s, features, n: int, naive: bool):
    """The VCM loss with the defaults of `VCMConfig`, n rows with s = t."""
    import torch

    w, m, lam, eps = 4.0, 0.25, 0.1, 0.01

    def column(time):
        return time[:, None, None]

    x_t, v = (1 - column(t)) * x0 + column(t) * x1, x1 - x0
    null = model.null_conditions(1, features[0].shape[1], features[1].shape[1])
    if naive:
        u = model
        null = [a.expand(len(t), *a.shape[1:]) for a in null]
        cond, later = features, slice(0, None)
    else:

        def u(x, t, s, *encoded):
            return model.velocity(x, t, s, encoded)

        null = [a.expand(len(t), *a.shape[1:]) for a in model.encode_conditions(*null)]
        cond, later = model.encode_conditions(*features), slice(n, None)
    predicted = u(x_t, t, s, *cond)
    with torch.no_grad():
        cond_later = [a[later] for a in cond]
        v_uncond = u(x_t, t, t, *null)
        v_guided = u(x_t[later], t[later], t[later], *cond_later)
        if not naive:
            v_guided = torch.cat([predicted[:n], v_guided])
        v_mix = m * (w * v + (1 - w) * v_uncond) + (1 - m) * v_guided
        v_mix = torch.where(column(t) <= 0.8, v_mix, v)
        l = torch.minimum(t + (s - t) * lam, t - 1e-4)[later]
        share = column((l - t[later]) / (s - t).clamp(max=-1e-4)[later])
        x_l = x_t[later] + column(l - t[later]) * v_mix[later]
        jumped = share * v_mix[later] + (1 - share) * u(x_l, l, s[later], *cond_later)
        target = torch.cat([v_mix[:n], jumped if not naive else jumped[n:]])
    mse = (predicted - target).square().mean((1, 2))
    return (mse / (mse.detach() + eps)).mean()


def time_torch(args) -> list[float]:
    """Milliseconds of each repeat."""
    import torch

    from vcm_jax.interop.torch_model import AverageVelocity
    from vcm_jax.models import MODELS

    c, batch = MODELS[args.model], args.batch
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, args.dtype)
    torch.manual_seed(0)
    with torch.device(device):
        model = AverageVelocity(
            c.latent_dim,
            c.clip_dim,
            c.sync_dim,
            c.text_dim,
            c.text_seq_len,
            c.hidden_dim,
            c.num_heads,
            c.joint_depth,
            c.fused_depth,
            c.audio_kernel,
        )

        def random(length, width):
            return torch.randn(batch, length, width)

        x0, x1 = (random(c.latent_seq_len, c.latent_dim) for _ in range(2))
        features = [
            random(c.clip_seq_len, c.clip_dim),
            random(c.sync_seq_len, c.sync_dim),
            random(c.text_seq_len, c.text_dim),
        ]
        t = torch.linspace(0.1, 0.9, batch)
        n = round(0.75 * batch)
        s = torch.cat([t[:n], t[n:] / 2])
    params = [p for p in model.parameters() if p.requires_grad]
    ema_weights = [[p.detach().clone() for p in params] for _ in range(2)]
    optimizer = torch.optim.AdamW(params, 1e-4, betas=(0.9, 0.95), eps=1e-6, weight_decay=1e-6)
    autocast = torch.autocast(device, dtype, enabled=dtype != torch.float32)

    def forward():
        with torch.no_grad(), autocast:
            model(x0, t, s, *features)

    def backward():
        with autocast:
            loss = model(x0, t, s, *features).square().mean()
        model.zero_grad()
        loss.backward()

    def step():
        with autocast:
            loss = torch_loss(model, x0, x1, t, s, features, n, args.work == "step_naive")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        for weights in ema_weights:
            torch._foreach_lerp_(weights, params, 0.01)

    call = {"forward": forward, "forward_backward": backward}.get(args.work, step)
    ms = []
    for _ in range(2 + args.repeats):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        ms.append(1e3 * (time.perf_counter() - start))
    return ms[2:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="small_16k")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=3, help="timings in each process")
    parser.add_argument("--rounds", type=int, default=2, help="processes for each library")
    parser.add_argument("--work", choices=WORKS, help="time this kind of work alone")
    parser.add_argument("--library", choices=["jax", "torch"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.library:
        print(json.dumps((time_jax if args.library == "jax" else time_torch)(args)))
        return
    works = [args.work] if args.work else WORKS
    found = {}
    for _ in range(args.rounds):
        for work in works:
            for library in ("torch",) if work == "step_naive" else ("jax", "torch"):
                given = [a for a in sys.argv[1:] if not a.startswith("--work")]
                command = [sys.executable, __file__, *given, f"--work={work}"]
                command.append(f"--library={library}")
                out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                found.setdefault((library, work), []).extend(json.loads(out.splitlines()[-1]))
    ms = {f"{library}_{work}_ms": [min(v), max(v)] for (library, work), v in found.items()}
    fastest = {key: min(values) for key, values in found.items()}
    ratios = {
        f"{work}_ratio": fastest["jax", work.removesuffix("_naive")] / fastest["torch", work]
        for work in works
        if ("jax", work.removesuffix("_naive")) in fastest and ("torch", work) in fastest
    }
    import harness

    harness.print_line(
        benchmark="against_torch",
        model=args.model,
        batch=args.batch,
        dtype=args.dtype,
        **ms,
        **ratios,
    )


if __name__ == "__main__":
    main()

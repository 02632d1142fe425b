"""What sound for a clip costs, from features to latents or to sound: JSON lines, one a sampler.

    python benchmarks/sampling.py --model=small_16k --batch=1
    python benchmarks/sampling.py --model=small_16k --with_codec      # --codec=DIR: its weights
    python benchmarks/sampling.py --model=small_16k --batch=64 --dtype=bfloat16

Few-step samplers (1 and 4 evaluations) beside 25 Euler steps with guidance (50 evaluations). The
conditions are encoded once a clip, in every line. `ratio_to_25x2` compares with the last line;
`flop_ratio_to_25x2` is what the counted operations alone would give. With a codec, lines of its own
say what encode, decode and vocode take, and `to_sound_ms` adds the last two for every clip.
"""

import argparse

import codec
import harness
import jax
import jax.numpy as jnp

from vcm_jax import sampling
from vcm_jax.models import MODELS, MMDiT
from vcm_jax.models.flops import forward_flops


def sampler(net, steps: int, guidance: float | None):
    """Function of variables, noise and raw conditions to latents; guided Euler or few-step."""

    def run(variables, x, cond):
        method = lambda name: lambda *args: net.apply(variables, *args, method=name)
        u, encode = method("velocity"), method("encode_conditions")
        if guidance is not None:
            null = encode(method("null_conditions")(x.shape[0]))
            u = sampling.guided_velocity(u, null, guidance)
        return sampling.sample(u, x, sampling.uniform_times(steps), encode(cond))

    return jax.jit(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="small_16k", choices=list(MODELS))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--with_codec", action="store_true", help="also to sound, random weights")
    parser.add_argument("--codec", help="also to sound, with the codec of this folder")
    args = parser.parse_args()

    to_sound = None
    if args.codec or args.with_codec:
        mode = "44k" if args.model.endswith("44k") else "16k"
        codec_ms = codec.measure(codec.open_codec(args.codec, mode, args.dtype), 8.0, args.repeats)
        to_sound = codec_ms["decode"] + codec_ms["vocode"]
    config = MODELS[args.model]
    net = MMDiT(config, jnp.dtype(args.dtype))
    cond = harness.random_like(harness.conditions(config, args.batch))
    noise = jax.ShapeDtypeStruct((args.batch, config.latent_seq_len, config.latent_dim), "float32")
    cond, x = jax.device_put((cond, harness.random_like(noise)))
    variables = jax.jit(net.init)(jax.random.key(0), x, jnp.ones(1), jnp.zeros(1), cond)
    cost = forward_flops(config)
    conditions, evaluation = cost["conditions"], sum(cost.values()) - cost["conditions"]
    flops = lambda steps, passes: passes * (conditions + steps * evaluation)
    slowest = None
    for steps, guidance in ((25, 4.5), (4, None), (1, None)):
        passes = 1 if guidance is None else 2
        run, compile_s = harness.compiled(sampler(net, steps, guidance), variables, x, cond)
        figures = harness.timed(lambda run=run: run(variables, x, cond), args.repeats)
        slowest = slowest or figures["ms_min"]
        if to_sound is not None:
            figures["to_sound_ms"] = figures["ms_min"] + args.batch * to_sound
        harness.print_line(
            benchmark="sampling", model=args.model, batch=args.batch, dtype=args.dtype,
            evaluations=f"{steps}x2" if guidance else str(steps), compile_s=compile_s, **figures,
            samples_per_s=1e3 * args.batch / figures["ms_min"],
            ratio_to_25x2=slowest / figures["ms_min"],
            flop_ratio_to_25x2=flops(25, 2) / flops(steps, passes),
        )  # fmt: skip


if __name__ == "__main__":
    main()

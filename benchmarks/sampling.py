"""The cost of generating a clip, from features to latents or to sound: a JSON line per sampler.

    python benchmarks/sampling.py --model=small_16k --batch=1
    python benchmarks/sampling.py --model=small_16k --with_codec      # --codec=DIR: its weights
    python benchmarks/sampling.py --model=small_16k --batch=64 --dtype=bfloat16

Few-step samplers (1 and 4 evaluations) are compared with 25 Euler steps with guidance (50
evaluations). All of them encode the conditions once per clip. `ratio_to_25x2` is the measured
ratio to 25 x 2 evaluations; `flop_ratio_to_25x2` is the ratio of the counted operations. With a
codec further lines give the times to encode, decode and vocode, and `to_sound_ms` adds the last two
for every clip.
"""

import argparse

import codec
import harness
import jax
import jax.numpy as jnp

from vcm_jax import sampling
from vcm_jax.models import MODELS, MMDiT
from vcm_jax.models.conditioned import sample_latents, zero_inputs
from vcm_jax.models.flops import forward_flops
from vcm_jax.objectives.vcm import VCMConfig
from vcm_jax.training.rows import abstract_batch


def sampler(net, steps: int, guidance: float | None):
    """A jitted function (variables, noise, features) -> latents."""
    way = sampling.Sampler(guidance_scale=guidance)
    times = sampling.uniform_times(steps)

    def run(variables, noise, features):
        return sample_latents(net, variables, features, noise, times, VCMConfig(), way)

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
    features = jax.device_put(harness.random_like(abstract_batch(config, args.batch)))
    noise = features["latent_mean"]
    variables = jax.jit(net.init)(jax.random.key(0), *zero_inputs(config))
    cost = forward_flops(config)
    conditions, evaluation = cost["conditions"], sum(cost.values()) - cost["conditions"]

    def flops(steps, passes):
        return passes * (conditions + steps * evaluation)

    slowest = None
    for steps, guidance in ((25, 4.5), (4, None), (1, None)):
        passes = 1 if guidance is None else 2
        run, compile_s = harness.compiled(sampler(net, steps, guidance), variables, noise, features)
        times = harness.timed(lambda run=run: run(variables, noise, features), args.repeats)
        slowest = slowest or times["ms_min"]
        if to_sound is not None:
            times["to_sound_ms"] = times["ms_min"] + args.batch * to_sound
        harness.print_line(
            benchmark="sampling",
            model=args.model,
            batch=args.batch,
            dtype=args.dtype,
            evaluations=f"{steps}x2" if guidance else str(steps),
            compile_s=compile_s,
            **times,
            samples_per_s=1e3 * args.batch / times["ms_min"],
            ratio_to_25x2=slowest / times["ms_min"],
            flop_ratio_to_25x2=flops(25, 2) / flops(steps, passes),
        )


if __name__ == "__main__":
    main()

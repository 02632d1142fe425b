"""Time and memory of the stages of `vcm_jax.generate --model`: encoders, network, codec.

    python benchmarks/generation_stages.py --model=mmaudio_large_44k_v2 --dtype=bfloat16
    python benchmarks/generation_stages.py --model=DIR --video=CLIP.mp4 --steps=2

Without --video it needs no weights: it compiles the programs of one clip of 8 s and counts their
arguments (weights included), results and temporary memory on the device. With --video it loads and
runs the stages one after another; it reports seconds, the peak of the process' memory in each stage
(on Linux), and on GPUs the peaks of JAX and PyTorch. It prints one JSON line for each stage.
"""

import argparse
import functools
import json
import resource
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from vcm_jax import sampling
from vcm_jax.codec import neural
from vcm_jax.generation import clips
from vcm_jax.generation.run import load_public
from vcm_jax.models import MODELS
from vcm_jax.objectives.flow_matching import FlowMatchingConfig
from vcm_jax.pretrained.table import PUBLIC_MODELS

GIB = 2**30


def program_memory(lowered) -> dict:
    """GiB on the device that a program needs while it runs."""
    found = lowered.compile().memory_analysis()
    sizes = {
        "arguments": found.argument_size_in_bytes,
        "results": found.output_size_in_bytes,
        "temporary": found.temp_size_in_bytes,
    }
    sizes["sum"] = sum(sizes.values()) - found.alias_size_in_bytes
    return {f"{name}_gib": round(size / GIB, 3) for name, size in sizes.items()}


def shapes_of_variables(config, dtype):
    from vcm_jax.interop.weights import abstract_variables

    variables = abstract_variables(config)
    held = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype)
    return variables | {"params": jax.tree.map(held, variables["params"])}


def lower_network(config, dtype, steps: int, scale: float):
    """The sampler's program for one clip with a video, a prompt and guidance."""
    full = jnp.float32
    features = {
        "clip": jax.ShapeDtypeStruct((1, config.clip_seq_len, config.clip_dim), full),
        "sync": jax.ShapeDtypeStruct((1, config.sync_seq_len, config.sync_dim), full),
        "text": jax.ShapeDtypeStruct((1, config.text_seq_len, config.text_dim), full),
        "has_clip": jax.ShapeDtypeStruct((1,), bool),
        "has_sync": jax.ShapeDtypeStruct((1,), bool),
        "has_text": jax.ShapeDtypeStruct((1,), bool),
    }
    noise = jax.ShapeDtypeStruct((1, config.latent_seq_len, config.latent_dim), full)
    keys = jax.eval_shape(functools.partial(clips._keys, 0, ["a"]))
    static = config, FlowMatchingConfig(guidance_scale=scale), sampling.OWN_SAMPLER
    times = sampling.check_times(sampling.uniform_times(steps))
    variables = shapes_of_variables(config, dtype)
    return clips._sample.lower(variables, *static, times, features, noise, keys)


def lower_codec(mode: str, latents: int, dtype):
    """{name: program} of the VAE's decoder and of the vocoder on its longest window."""
    from vcm_jax.interop import import_codec

    sizes = neural.MODES[mode]
    zeros = lambda shapes: {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    states = zeros(import_codec.vae_shapes(sizes)), zeros(import_codec.vocoder_shapes(sizes))
    with np.errstate(all="ignore"):
        arrays = import_codec.codec_from_torch(*states, mode).arrays
    held = {
        name: jax.ShapeDtypeStruct(array.shape, dtype if array.ndim == 3 else jnp.float32)
        for name, array in arrays.items()
    }
    decoder = {n: a for n, a in held.items() if n.startswith(("decoder.", "data_"))}
    vocoder = {n.removeprefix("vocoder."): a for n, a in held.items() if n.startswith("vocoder.")}
    frames = min(2 * latents, neural._WINDOW)
    mel = jax.ShapeDtypeStruct((1, frames, sizes.mel.bands), jnp.float32)
    z = jax.ShapeDtypeStruct((1, latents, sizes.latent_dim), jnp.float32)
    return {
        "decoder": neural._decode.lower(decoder, z),
        "vocoder": neural._vocode.lower(vocoder, mel, sizes.tanh),
    }


def count(args) -> None:
    public = PUBLIC_MODELS[args.model]
    config, dtype = MODELS[public.model], jnp.dtype(args.dtype)
    network = lower_network(config, dtype, args.steps or public.steps, public.guidance_scale)
    programs = {"network": network} | lower_codec(public.mode, config.latent_seq_len, dtype)
    for name, lowered in programs.items():
        print(json.dumps({"program": name, "dtype": args.dtype} | program_memory(lowered)))


def _reset_peak() -> None:
    place = Path("/proc/self/clear_refs")
    if place.exists():
        place.write_text("5")


def _peak_gib() -> float:
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return round(int(line.split()[1]) * 1024 / GIB, 2)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB, 2)


def _device_peaks() -> dict:
    stats = jax.local_devices()[0].memory_stats() or {}
    found = {"jax_peak_gib": stats["peak_bytes_in_use"] / GIB} if stats else {}
    try:
        import torch

        if torch.cuda.is_available():
            found["torch_peak_gib"] = torch.cuda.max_memory_allocated() / GIB
    except ImportError:
        pass
    return {name: round(size, 2) for name, size in found.items()}


def measure(args) -> None:
    start = time.perf_counter()
    run = load_public(args.model, dtype=args.dtype)
    report("files", start, start)
    times = sampling.uniform_times(args.steps or run.steps)
    request = clips.Request("clip", Path(args.video), args.prompt)

    def stage(name, work):
        _reset_peak()
        start = time.perf_counter()
        with run.stage(name) as loaded:
            jax.block_until_ready(loaded.variables)
            ready = time.perf_counter()
            value = work(loaded)
        report(name, start, ready)
        return value

    item = stage("encoders", lambda loaded: clips.encode_request(request, loaded, args.duration))
    (latent,) = stage(
        "variables", lambda loaded: clips.generate_latents(loaded, [item], times, 0, 1)
    )
    stage("codec", lambda loaded: clips.decode(loaded, item, latent, 0))


def report(name: str, start: float, ready: float) -> None:
    now = time.perf_counter()
    line = {"stage": name, "load_s": round(ready - start, 1), "run_s": round(now - ready, 1)}
    print(json.dumps(line | {"host_peak_gib": _peak_gib()} | _device_peaks()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mmaudio_large_44k_v2", help="name, or folder of files")
    parser.add_argument("--video", help="clip; without it the programs are counted only")
    parser.add_argument("--prompt", default="waves, seagulls")
    parser.add_argument("--steps", type=int, default=0, help="0: the model's own")
    parser.add_argument("--duration", type=float, default=8.0, help="seconds, at most")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    args = parser.parse_args()
    (measure if args.video else count)(args)


if __name__ == "__main__":
    main()

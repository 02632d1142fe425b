"""The cost of turning sound into latents and back: a JSON line each for encode, decode and vocode.

    python benchmarks/codec.py --codec=codecs/16k --seconds=8
    python benchmarks/codec.py --mode=44k --dtype=bfloat16      # random weights

Decode turns latents into a mel spectrogram, vocode turns a mel spectrogram into sound. `first_s`
includes reading the weights and compiling; `peak_memory_gb` is the peak of the process so far.
"""

import argparse
import time

import harness
import jax.numpy as jnp
import numpy as np

from vcm_jax.codec.neural import MODES, NeuralCodec
from vcm_jax.interop import import_codec


def random_codec(mode: str, dtype) -> NeuralCodec:
    """A codec of the size of a mode, with random weights."""
    rng = np.random.default_rng(0)

    def noise(shape):
        return rng.standard_normal(shape, np.float32) / np.sqrt(max(1, np.prod(shape[1:])))

    vae = {name: noise(shape) for name, shape in import_codec.vae_shapes(MODES[mode]).items()}
    vae["data_std"] = np.abs(vae["data_std"]) + 1
    vocoder = {name: noise(s) for name, s in import_codec.vocoder_shapes(MODES[mode]).items()}
    arrays = import_codec.codec_from_torch(vae, vocoder, mode).arrays
    return NeuralCodec(mode, arrays, "random", dtype)


def measure(codec: NeuralCodec, seconds: float, repeats: int) -> dict[str, float]:
    """Prints a line for each of encode, decode and vocode.

    Returns:
      Milliseconds of the fastest run of each.
    """
    sound = np.random.default_rng(0).uniform(-0.5, 0.5, round(seconds * codec.sample_rate))
    value, fastest = sound.astype(np.float32), {}
    for step, call in (
        ("encode", lambda x: codec.encode(x)[0]),
        ("decode", codec.decode_mel),
        ("vocode", codec.vocode),
    ):
        start = time.perf_counter()
        result = call(value)
        first = time.perf_counter() - start
        times = harness.timed(lambda call=call, x=value: call(x), repeats, warmup=0)
        harness.print_line(
            benchmark="codec",
            step=step,
            mode=codec.mode,
            seconds=seconds,
            dtype=codec.dtype.name,
            first_s=first,
            **times,
            peak_memory_gb=harness.peak_memory_bytes() / 1e9,
        )
        value, fastest[step] = result, times["ms_min"]
    return fastest


def open_codec(folder: str | None, mode: str, dtype) -> NeuralCodec:
    """The codec of a folder, or one of a mode with random weights."""
    dtype = jnp.dtype(dtype)
    return NeuralCodec.load(folder, dtype) if folder else random_codec(mode, dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--codec", help="codec folder")
    source.add_argument("--mode", choices=list(MODES), help="instead of a folder: random weights")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    measure(open_codec(args.codec, args.mode, args.dtype), args.seconds, args.repeats)


if __name__ == "__main__":
    main()

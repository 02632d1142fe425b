"""What codecs lose: true sounds against their round trips, as a table and a picture.

    python benchmarks/codec_round_trip.py --sounds=DIR --codec=CODEC [--codec=OTHER ...] \
        [--hold_out=50 --train=TRAIN_DIR] [--picture=PICTURE.png]

Every codec encodes and decodes every sound. A learned codec with linear latents is also decoded by
Griffin-Lim, from the same latents. `spectral_convergence` compares linear magnitudes, which neither
the latents nor the losses are made of. With --train, the sounds that are not among the --hold_out
ones are linked into TRAIN_DIR for `vcm_jax.codec.train`, and nothing is measured.
"""

import argparse
import os
import time
from pathlib import Path

import harness
import numpy as np
from matplotlib import pyplot as plt

from vcm_jax.codec import LearnedCodec, LinearCodec, load_codec
from vcm_jax.media.clips import SOUND_SUFFIXES, list_files
from vcm_jax.media.names import VIDEO_SUFFIXES
from vcm_jax.media.read import read_audio
from vcm_jax.metrics import log_mel_features
from vcm_jax.metrics.sounds import SoundMetrics

LONGEST = 10.0  # s of each sound


def split(folder: Path, hold_out: int) -> tuple[list[str], list[str]]:
    """(files for training, files that are held out), drawn at random, the same always."""
    files = list_files(folder, (*SOUND_SUFFIXES, *VIDEO_SUFFIXES))
    order = np.random.default_rng(0).permutation(len(files))
    held = {files[i] for i in order[:hold_out]}
    return [f for f in files if f not in held], sorted(held)


def codecs(folders: list[str]) -> dict:
    """{name: codec}, with Griffin-Lim for the latents of learned codecs."""
    found = {}
    for folder in folders:
        codec = load_codec(folder)
        found[f"{Path(folder).name}: {codec.name}"] = codec
        if isinstance(codec, LearnedCodec) and codec.encoder == "linear":
            arrays = codec.arrays["encoder/mean"], codec.arrays["encoder/components"]
            found[f"{Path(folder).name}: Griffin-Lim"] = LinearCodec(*arrays, np.nan, codec.mode)
    return found


def draw(path: str, sounds: dict[str, np.ndarray], sample_rate: int) -> None:
    """Log-mel spectrograms of one sound, below each other."""
    figure, axes = plt.subplots(len(sounds), 1, figsize=(9, 1.7 * len(sounds)), sharex=True)
    for axis, (name, sound) in zip(axes, sounds.items()):
        rows = log_mel_features(sound, sample_rate)
        extent = (0, len(sound) / sample_rate, 0, rows.shape[1])
        colours = dict(vmin=-5, vmax=1.5, cmap="magma")
        axis.imshow(rows.T, origin="lower", aspect="auto", extent=extent, **colours)
        axis.set(yticks=[], title=name)
    axes[-1].set_xlabel("seconds")
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sounds", required=True, type=Path)
    parser.add_argument("--codec", action="append", default=[])
    parser.add_argument("--hold_out", type=int, default=50)
    parser.add_argument("--train", type=Path)
    parser.add_argument("--picture")
    args = parser.parse_args()
    training, held_out = split(args.sounds, args.hold_out)
    if args.train:
        for name in training:
            link = args.train / name
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.exists():
                os.symlink((args.sounds / name).resolve(), link)
        return
    shown = {}
    for label, codec in codecs(args.codec).items():
        rate, seconds = codec.sample_rate, []
        metrics = SoundMetrics(rate)
        for name in held_out:
            sound = read_audio(args.sounds / name, rate)[: round(LONGEST * rate)]
            latents = codec.encode(sound)[0]
            started = time.perf_counter()
            found = codec.decode(latents)[: len(sound)]
            seconds.append((time.perf_counter() - started) / len(sound) * rate)
            if len(sound) > 0.1 * rate:
                metrics.add(name, found, sound)
                if len(metrics.clips) == 1:
                    shown |= {"true": sound, label: found}
        values = {key: round(value, 4) for key, value in metrics.values().items()}
        harness.print_line(
            codec=label,
            sounds=len(metrics.clips),
            **values,
            decoding_s_per_s=float(np.median(seconds)),
        )
    if args.picture and shown:
        draw(args.picture, shown, rate)


if __name__ == "__main__":
    main()

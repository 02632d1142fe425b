"""Makes the picture at the top of the README: frames, true sound and generated sound of one clip.

    bash launch/demo.sh
    python benchmarks/readme_picture.py --data=data/impacts --clip=0 \
        --video=runs/impacts/videos/000000_1_step.mp4 --out=docs/demo.png

The demo writes both inputs: --data holds the simulated clips with their true sound, and --video is
the same clip with the sound that the trained network generated. The clips are those of the test
split, which training never sees.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt

from vcm_jax.media.read import read_audio, read_frames
from vcm_jax.metrics import log_mel_features

SAMPLE_RATE = 16_000
FPS = 25
FRAMES = 8


def read_clip(data: Path, clip: int) -> dict:
    """Reads what happens in a test clip: `id`, `caption`, `duration` (s) and `impacts`.

    Raises:
      ValueError: the folder does not hold the simulated test clips, or has fewer of them.
    """
    path = data / "test_impacts.jsonl"
    if not path.is_file():
        raise ValueError(f"{path} is missing: make the data with `python -m vcm_jax.impacts`")
    lines = path.read_text().splitlines()
    if not 0 <= clip < len(lines):
        raise ValueError(f"--clip={clip}: {path} has the clips 0 to {len(lines) - 1}")
    return json.loads(lines[clip])


def draw(frames: np.ndarray, sounds: dict[str, np.ndarray], marks, duration: float):
    """Draws frames (T, H, W, 3) above the spectrograms of `sounds`, on one time axis in seconds.

    Every frame is the one in the middle of the time that it covers; dotted lines show `marks`.
    """
    figure, axes = plt.subplots(
        1 + len(sounds),
        figsize=(8, 3.9),
        sharex=True,
        gridspec_kw=dict(height_ratios=[0.74, *[1] * len(sounds)], hspace=0.08),
    )
    slot = duration / FRAMES
    for i in range(FRAMES):
        frame = frames[min(int((i + 0.5) * slot * FPS), len(frames) - 1)]
        axes[0].imshow(frame, extent=(i * slot, (i + 1) * slot, 0, 1), aspect="auto")
        axes[0].axvline(i * slot, color="white", lw=1.5)
    for axis, sound in zip(axes[1:], sounds.values()):
        rows = log_mel_features(sound, SAMPLE_RATE)
        extent = (0, len(sound) / SAMPLE_RATE, 0, rows.shape[1])
        axis.imshow(
            rows.T, origin="lower", aspect="auto", cmap="magma", vmin=-5, vmax=1.5, extent=extent
        )
        for mark in marks:
            axis.axvline(mark, color="white", lw=1, ls=":")
    for axis, name in zip(axes, ["silent\nvideo", *sounds]):
        axis.set_yticks([])
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=11)
        axis.tick_params(bottom=axis is axes[-1])
        axis.spines[:].set_visible(False)
    axes[-1].set_xlim(0, duration)
    axes[-1].set_xlabel("seconds; dotted lines: simulated impacts", fontsize=11)
    return figure


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder that `vcm_jax.impacts` wrote")
    parser.add_argument("--video", required=True, help="the clip with its generated sound")
    parser.add_argument("--clip", type=int, default=0, help="which test clip (0)")
    parser.add_argument("--out", required=True, help="PNG file to write")
    args = parser.parse_args(argv)
    try:
        clip = read_clip(Path(args.data), args.clip)
        name, duration = f"{clip['id']}.mp4", clip["duration"]
        true = Path(args.data, "test", name)
        frames = read_frames(true, {FPS: lambda frame: frame}, duration)[FPS]
        read = lambda path: read_audio(path, SAMPLE_RATE, round(duration * SAMPLE_RATE))
        sounds = {"true\nsound": read(true), "generated\nsound": read(args.video)}
    except ValueError as error:
        sys.exit(f"error: {error}")
    figure = draw(frames, sounds, [impact["time"] for impact in clip["impacts"]], duration)
    figure.savefig(args.out, dpi=140, bbox_inches="tight", pad_inches=0.05)
    print(f"{args.out}: test clip {clip['id']}, {clip['caption']!r}")


if __name__ == "__main__":
    main()

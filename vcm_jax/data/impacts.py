"""Impacts, the embedded data set: simulated videos of bouncing balls with sound.

One to three balls of metal, wood, glass, rubber or stone bounce in a box seen from the side, and
each impact on floor or walls sounds. The picture shows when and what hits how hard; it does not
show everything about the sound (each ball's pitch within an octave, its modes, the room and the
background noise are hidden draws), so that many sounds fit one picture. The impact times are
known exactly, which makes synchrony measurable.

    python -m vcm_jax.data.impacts --out=data/impacts

writes OUT/train/000000.mp4 ..., OUT/train.tsv (columns id, caption) and OUT/train_impacts.jsonl
(what happened in each clip), and the same for val and test. Running it again keeps the clips that
are there.
"""

import concurrent.futures
import dataclasses
import functools
import json
import math
import multiprocessing
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from absl import app, flags
from tqdm import tqdm

from vcm_jax.atomic import atomic_path
from vcm_jax.data.impacts_render import (
    BOX,
    FPS,
    MARGIN,
    MOTION,
    SAMPLE_RATE,
    SIZE,
    render_frames,
    render_sound,
)

VERSION = 1  # of the simulated world: a folder made by another version is refused
SPLITS = ("train", "val", "test")
GRAVITY = 9.81  # m/s^2
ROLLING = 0.8  # m/s^2, deceleration of a rolling ball
FRICTION = 0.95  # horizontal speed kept in an impact on the floor
AUDIBLE = 0.5  # m/s: slower impacts neither sound nor count
SETTLED = 0.7  # m/s: a ball that leaves the floor slower than this stays on it
# Mean coefficients of restitution, in the order in which captions name the materials.
RESTITUTION = {"metal": 0.65, "wood": 0.5, "glass": 0.6, "rubber": 0.76, "stone": 0.38}
_ADJECTIVES = {"wood": "wooden"}
_IMPACTS_PER_SECOND = (1.2, 4.3)  # fewest and most: 3 to 11 in 2.56 s


@dataclasses.dataclass(frozen=True)
class Ball:
    """material; radius in metres; path: pieces K, 7 of (start time, x, y, vx, vy, ax, ay).

    x runs from 0 (left wall) to BOX (right wall), y from 0 (floor) upwards; metres and seconds.
    """

    material: str
    radius: float
    path: np.ndarray

    def position(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Centre (x, y) at times (..., seconds, >= 0), exact: the path is piecewise parabolic."""
        piece = self.path[np.searchsorted(self.path[:, 0], times, side="right") - 1]
        start, x, y, vx, vy, ax, ay = np.moveaxis(piece, -1, 0)
        dt = times - start
        return x + vx * dt + ax * dt**2 / 2, y + vy * dt + ay * dt**2 / 2


@dataclasses.dataclass(frozen=True)
class Impact:
    """An audible impact: time in seconds, index and material of the ball, speed in m/s (normal to
    the surface), and the surface, "floor" or "wall"."""

    time: float
    ball: int
    material: str
    speed: float
    surface: str


@dataclasses.dataclass(frozen=True)
class Scene:
    """A clip before rendering: duration in seconds, balls (the first is furthest back), audible
    impacts in order of time, and the keys of its random streams: `key` (seed, split number,
    index) and `hidden`. Scenes that differ in `hidden` alone look the same and sound different.
    """

    duration: float
    balls: tuple[Ball, ...]
    impacts: tuple[Impact, ...]
    key: tuple[int, int, int]
    hidden: int = 0


def _throw(rng: np.random.Generator) -> float:
    """A horizontal speed in m/s, to either side."""
    return rng.uniform(0.1, 1.5) * rng.choice((-1, 1))


def _bounce(
    rng: np.random.Generator, radius: float, restitution: float, pause: float, duration: float
):
    """Follows one ball from event to event, each solved in closed form.

    Returns its path (see `Ball`) and its audible impacts [(time, speed, surface)] before
    `duration`. A ball that has come to rest is tossed up again, silently, after 0.2 to 1.6 times
    `pause` seconds.
    """
    left, right = radius, BOX - radius
    t, x, vx = 0.0, rng.uniform(left, right), _throw(rng)
    start = rng.choice(3, p=(0.4, 0.3, 0.3))
    if start == 0:  # already in flight
        y, vy = rng.uniform(0.3, 1.2), rng.uniform(-2.5, 2.5)
    elif start == 1:  # held, then let go
        t, y, vy = rng.uniform(0.0, 1.4), rng.uniform(0.4, 1.4), 0.0
    else:  # comes in through the open top, inwards: it must not hit a wall out of sight
        vx = math.copysign(vx, BOX / 2 - x)
        t, y, vy = rng.uniform(0.0, 1.4), BOX + MARGIN + radius, rng.uniform(-1.5, 0.0)
    path, impacts = [(0.0, x, y, 0, 0, 0, 0)], []
    toss = math.inf  # when a ball that lies or rolls on the floor is thrown again
    while t < duration:
        grounded = toss < math.inf
        roll = ROLLING if grounded else 0.0
        ax, ay = -math.copysign(roll, vx) if vx else 0.0, 0.0 if grounded else -GRAVITY
        path.append((t, x, y, vx, vy, ax, ay))
        # The next event is the first of these; a wall is reached only if the roll lasts.
        to_floor = to_wall = to_stop = math.inf
        if not grounded:
            to_floor = (vy + math.sqrt(vy**2 + 2 * GRAVITY * (y - radius))) / GRAVITY
        if vx:
            gap = right - x if vx > 0 else x - left
            left_over = vx**2 - 2 * roll * gap
            if left_over > 0:
                to_wall = 2 * gap / (abs(vx) + math.sqrt(left_over))
            if roll:
                to_stop = abs(vx) / roll
        dt = min(to_floor, to_wall, to_stop, toss - t)
        t, x, y = t + dt, x + vx * dt + ax * dt**2 / 2, y + vy * dt + ay * dt**2 / 2
        vx, vy = vx + ax * dt, vy + ay * dt
        if dt == to_floor:
            impacts.append((t, -vy, "floor"))
            y, vx, vy = radius, FRICTION * vx, -restitution * vy
            if vy < SETTLED:
                vy, toss = 0.0, t + pause * rng.uniform(0.2, 1.6)
        elif dt == to_wall:
            impacts.append((t, abs(vx), "wall"))
            x, vx = right if vx > 0 else left, -restitution * vx
        elif dt == to_stop:
            vx = 0.0
        else:
            vx, vy, toss = _throw(rng), rng.uniform(2.0, 5.0), math.inf
    audible = [hit for hit in impacts if hit[0] < duration and hit[1] >= AUDIBLE]
    return np.array(path, float), audible


def simulate(seed: int, split: str, index: int, duration: float = 2.56, hidden: int = 0) -> Scene:
    """Clip number `index` of a split ("train", "val", "test"): a pure function of its arguments.

    Args: seed, index, hidden: integers >= 0; duration in seconds, at least 0.5. `hidden` draws
    another sound for the same picture (the data set has hidden = 0).

    Raises: ValueError for an unknown split or too short a duration.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    if not duration >= 0.5:
        raise ValueError(f"duration {duration} s is too short: at least 0.5 s")
    key = (seed, SPLITS.index(split), index)
    rng = np.random.default_rng([*key, MOTION, 0])
    fewest, most = (int(rate * duration) for rate in _IMPACTS_PER_SECOND)
    names = list(RESTITUTION)
    materials = [names[i] for i in rng.choice(len(names), rng.choice((1, 2, 3), p=(0.4, 0.4, 0.2)))]
    while True:  # until the number of impacts is within bounds: two tries or fewer, on average
        balls, impacts = [], []
        for number, material in enumerate(materials):
            radius = rng.uniform(0.08, 0.16)
            restitution = RESTITUTION[material] + rng.uniform(-0.04, 0.04)
            pause = len(materials)  # the more balls, the longer each of them lies still
            path, hits = _bounce(rng, radius, restitution, pause, duration)
            balls.append(Ball(material, radius, path))
            impacts += [Impact(t, number, material, speed, where) for t, speed, where in hits]
        if max(fewest, 1) <= len(impacts) <= most:
            impacts.sort(key=lambda impact: impact.time)
            return Scene(duration, tuple(balls), tuple(impacts), key, hidden)


def caption(scene: Scene) -> str:
    """What bounces, for example "two glass balls and a rubber ball bouncing"."""
    parts = []
    for material in RESTITUTION:
        count = sum(ball.material == material for ball in scene.balls)
        name = _ADJECTIVES.get(material, material)
        if count:
            parts.append((f"a {name} ball", f"two {name} balls", f"three {name} balls")[count - 1])
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]])) + " bouncing"


def record(scene: Scene) -> dict:
    """What happened in a clip, as a line of SPLIT_impacts.jsonl: id, duration, caption,
    balls [{material, radius}], impacts [{time, ball, material, speed, surface}]."""
    return {
        "id": f"{scene.key[2]:06d}",
        "duration": scene.duration,
        "caption": caption(scene),
        "balls": [{"material": b.material, "radius": round(b.radius, 4)} for b in scene.balls],
        "impacts": [
            dataclasses.asdict(i) | {"time": round(i.time, 6), "speed": round(i.speed, 4)}
            for i in scene.impacts
        ],
    }


def _make_clip(job: tuple[str, str, int], seed: int, duration: float) -> dict:
    """Writes one clip unless it is there; returns its record. job: (folder, split, index)."""
    from vcm_jax.features.media import write_mp4  # features build on data, not the reverse

    out, split, index = job
    scene = simulate(seed, split, index, duration)
    line = record(scene)
    path = Path(out, split, f"{line['id']}.mp4")
    if not path.exists():
        write_mp4(path, render_frames(scene), FPS, render_sound(scene), SAMPLE_RATE)
    return line


def _claim(out: Path, settings: dict) -> None:
    """Notes the settings in OUT/impacts.json, or checks them against those that are there."""
    path = out / "impacts.json"
    if path.exists():
        there = json.loads(path.read_text())
        if there != settings:
            differing = [k for k in settings if there.get(k) != settings[k]]
            old, new = ({k: d.get(k) for k in differing} for d in (there, settings))
            raise ValueError(f"{out} was made with {old}, not {new}: give another --out")
    elif out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty and has no impacts.json: give another --out")
    else:
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(settings) + "\n")


def write_dataset(
    out: str | Path, counts: Mapping[str, int], duration: float, seed: int, workers: int
) -> None:
    """Writes the clips 0 .. counts[split] - 1 of each split and their lists (see the module).

    Clips that are there are kept, so a broken run is taken up again, and a larger count adds
    clips. The clips do not depend on the counts or on the number of worker processes.

    Raises: ValueError if `out` holds something else or was made with other settings.
    """
    out = Path(out)
    simulate(seed, "train", 0, duration)  # complains about its arguments before anything is made
    settings = dict(
        version=VERSION, seed=seed, duration=duration, fps=FPS, sample_rate=SAMPLE_RATE, size=SIZE
    )
    _claim(out, settings)
    jobs = [(str(out), split, i) for split in SPLITS for i in range(counts.get(split, 0))]
    make = functools.partial(_make_clip, seed=seed, duration=duration)
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(max(workers, 1), spawn) as pool:
        lines = pool.map(make, jobs, chunksize=8) if workers > 1 else map(make, jobs)
        lines = list(tqdm(lines, "Impacts", len(jobs), unit="clip"))
    for split in SPLITS:
        of_split = [line for line, job in zip(lines, jobs, strict=True) if job[1] == split]
        if not of_split:
            continue
        with atomic_path(out / f"{split}_impacts.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in of_split))
        with atomic_path(out / f"{split}.tsv") as temporary:
            rows = [f"{line['id']}\t{line['caption']}\n" for line in of_split]
            temporary.write_text("".join(["id\tcaption\n", *rows]))


def _define_flags() -> None:
    # Not at import: other commands that import this module have flags of the same names.
    flags.DEFINE_string("out", None, "Folder to write to.", required=True)
    for split, count in zip(SPLITS, (2400, 100, 200)):
        flags.DEFINE_integer(split, count, f"Number of {split} clips.", lower_bound=0)
    flags.DEFINE_float("duration", 2.56, "Seconds per clip.", lower_bound=0.5)
    flags.DEFINE_integer("seed", 0, "Another seed gives other clips.", lower_bound=0)
    flags.DEFINE_integer("workers", 2, "Processes.", lower_bound=1)


def _main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    args = flags.FLAGS
    counts = {split: args[split].value for split in SPLITS}
    try:
        write_dataset(args.out, counts, args.duration, args.seed, args.workers)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    _define_flags()
    app.run(_main)

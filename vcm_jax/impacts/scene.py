"""Scenes of bouncing balls: simulated motion and impacts, before anything is rendered."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

VERSION = 1  # of the simulated world: a folder made by another version is refused
BOX = 1.5  # metres, inner width and visible inner height of the box
MARGIN = 0.07  # metres, thickness of floor and walls in the picture
SPLITS = ("train", "val", "test")
GRAVITY = 9.81  # m/s^2
ROLLING = 0.8  # m/s^2, deceleration of a rolling ball
FRICTION = 0.95  # horizontal speed kept in an impact on the floor
AUDIBLE = 0.5  # m/s: slower impacts neither sound nor count
SETTLED = 0.7  # m/s: a ball that leaves the floor slower than this stays on it
# Mean coefficients of restitution, in the order in which captions name the materials.
RESTITUTION = {"metal": 0.65, "wood": 0.5, "glass": 0.6, "rubber": 0.76, "stone": 0.38}
MATERIALS = tuple(RESTITUTION)
# The streams of random numbers of a scene: what moves, what is seen, what is only heard.
MOTION, LOOK, HIDDEN = range(3)
_ADJECTIVES = {"wood": "wooden"}
_IMPACTS_PER_SECOND = (1.2, 4.3)  # fewest and most: 3 to 11 in 2.56 s


@dataclasses.dataclass(frozen=True)
class Ball:
    """A ball and its motion.

    Attributes:
      material: a key of RESTITUTION.
      radius: metres.
      path: (K, 7), the parabolic segments of its path, each (start time, x, y, vx, vy, ax, ay). x
        runs from 0 (left wall) to BOX (right wall), y from 0 (floor) upwards, in metres and
        seconds.
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
    """An audible impact.

    Attributes:
      time: seconds.
      ball, material: index and material of the ball.
      speed: m/s, normal to the surface.
      surface: "floor" or "wall".
    """

    time: float
    ball: int
    material: str
    speed: float
    surface: str


@dataclasses.dataclass(frozen=True)
class Scene:
    """A clip before rendering. Scenes that differ in `hidden` alone look alike but sound different.

    Attributes:
      duration: seconds.
      balls: the first is furthest back.
      impacts: the audible ones, in order of time.
      key: (seed, number of the split, index) of its random streams.
      hidden: of the random stream of what is only heard.
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

    A ball that has come to rest is tossed up again, silently, after 0.2 to 1.6 times `pause`
    seconds.

    Returns:
      Its path (see `Ball`), and its audible impacts [(time, speed, surface)] before `duration`.
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


def simulate(
    seed: int,
    split: str,
    index: int,
    duration: float = 2.56,
    hidden: int = 0,
    materials: Sequence[str] = MATERIALS,
) -> Scene:
    """Clip number `index` of a split ("train", "val", "test"): a pure function of its arguments.

    Args:
      seed, index: integers >= 0.
      split: "train", "val" or "test".
      duration: seconds, at least 0.5.
      hidden: an integer >= 0; another one gives another sound for the same picture. The data set
        has 0.
      materials: those that balls can have.

    Raises:
      ValueError: an unknown split or material, no material, or too short a duration.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    if not duration >= 0.5:
        raise ValueError(f"duration {duration} s is too short: at least 0.5 s")
    names = [name for name in MATERIALS if name in materials]
    if not names or len(names) < len(materials):
        raise ValueError(
            f"materials {', '.join(materials) or 'none'}: give some of {', '.join(MATERIALS)}, "
            "each once"
        )
    key = (seed, SPLITS.index(split), index)
    rng = np.random.default_rng([*key, MOTION, 0])
    fewest, most = (int(rate * duration) for rate in _IMPACTS_PER_SECOND)
    count = rng.choice((1, 2, 3), p=(0.4, 0.4, 0.2))
    balls_of = [names[i] for i in rng.choice(len(names), count)]
    while True:  # until the number of impacts is within bounds: two tries or fewer, on average
        balls, impacts = [], []
        for number, material in enumerate(balls_of):
            radius = rng.uniform(0.08, 0.16)
            restitution = RESTITUTION[material] + rng.uniform(-0.04, 0.04)
            pause = len(balls_of)  # the more balls, the longer each of them lies still
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
    """A clip's line of SPLIT_impacts.jsonl.

    It has id, duration, caption, balls [{material, radius}], and impacts
    [{time, ball, material, speed, surface}].
    """
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

"""Clips longer than those of training: windows against one evaluation, seams, time and memory.

    python -m vcm_jax.impacts --out=data/long --train=0 --val=0 --test=100 --duration=10.24
    python benchmarks/windows.py scores --workdir=RUN --data=data/long
    python -m vcm_jax.impacts --out=data/minute --train=0 --val=0 --test=8 --duration=60
    python benchmarks/windows.py seams --workdir=RUN --data=data/minute
    python benchmarks/windows.py cost --workdir=RUN --seconds=600

`scores` prints onset F1 and log-mel Frechet distance of clips that are sampled in windows, as a
whole, and in separate windows (each with a noise of its own) whose sounds are cross-faded.

`seams` asks whether the frames at seams differ from the others. What is compared is the difference
of the generated sound from the true one in the same frame, so that what happens in these clips at
these times does not count. The time from one seam to the next is divided into 24 phases; for level,
change from frame to frame, and spectrum (the band that deviates most) it prints how far the phase
at the seam is from the mean of the others, in standard deviations between phases.

`cost` generates a prompt of some length and prints seconds and the peak memory of the process.
"""

import argparse
import dataclasses
import time
from pathlib import Path

import harness
import numpy as np

from vcm_jax import sampling
from vcm_jax.generation.clips import Request, encode_request, generate
from vcm_jax.generation.run import Run, load_run
from vcm_jax.generation.windows import Windowing
from vcm_jax.impacts.scores import read_sounds, read_split
from vcm_jax.metrics import (
    detect_onsets,
    frechet_distance,
    log_mel_features,
    merge_close,
    onset_scores,
)

PHASES = 24
HOP = 0.016  # s, of `log_mel_features`
EDGE = 0.5  # s at both ends of a clip that are left out of the statistics of seams


def sounds_of(run: Run, items: list, steps: int) -> list[np.ndarray]:
    """Sounds of items, in their order."""
    made = generate(run, items, sampling.uniform_times(steps), batch_size=8)
    found = {item.request.id: sound for item, sound in made}
    return [found[item.request.id] for item in items]


def separate_sounds(run: Run, items: list, steps: int) -> list[np.ndarray]:
    """Sounds whose windows are clips of their own, with noise of their own, and cross-faded."""
    rate, mixed = run.codec.sample_rate, []
    for item in items:
        parts = [
            dataclasses.replace(
                item,
                request=Request(f"{item.request.id} {i}", None),
                seconds=item.sequence.duration,
                clip=item.clip[i],
                sync=item.sync[i],
                windows=None,
            )
            for i in range(len(item.windows.starts))
        ]
        total = np.zeros(round(item.seconds * rate) + rate)
        weight = np.full(len(total), 1e-9)
        for start, sound in zip(item.windows.times, sounds_of(run, parts, steps)):
            place = round(start * rate)
            bell = np.sin(np.pi * (np.arange(len(sound)) + 0.5) / len(sound)) ** 2 + 1e-6
            total[place : place + len(sound)] += bell * sound
            weight[place : place + len(sound)] += bell
        mixed.append((total / weight)[: round(item.seconds * rate)].astype(np.float32))
    return mixed


def windowings(run: Run) -> dict[str, Windowing]:
    length = run.sequence.duration
    return {
        "one evaluation": Windowing(0.0),
        "windows, overlap 1/4": Windowing(length, 0.25),
        "windows, overlap 1/2": Windowing(length, 0.5),
        "windows of twice the length, overlap 1/4": Windowing(2 * length, 0.25),
    }


def scores(run: Run, clips: list[dict], all_steps: list[int]) -> None:
    rate = run.codec.sample_rate
    times = [merge_close(np.array([i["time"] for i in clip["impacts"]])) for clip in clips]
    truth = np.concatenate([log_mel_features(sound, rate) for sound in read_sounds(clips, rate)])

    def line(name: str, steps: int, sounds: list[np.ndarray]) -> None:
        onsets = [merge_close(detect_onsets(sound, rate)) for sound in sounds]
        rows = np.concatenate([log_mel_features(sound, rate) for sound in sounds])
        distance = frechet_distance(rows, truth)
        found = onset_scores(onsets, times)
        found = {key: round(found[key], 4) for key in ("f1", "precision", "recall")}
        harness.print_line(sampled=name, steps=steps, **found, frechet=round(distance, 3))

    for name, windowing in windowings(run).items():
        divided = dataclasses.replace(run, windowing=windowing)
        items = encode(divided, clips)
        for steps in all_steps:
            line(name, steps, sounds_of(divided, items, steps))
            if name.endswith("1/2"):
                line("separate windows, overlap 1/2", steps, separate_sounds(divided, items, steps))


def encode(run: Run, clips: list[dict]) -> list:
    return [encode_request(Request(c["id"], c["path"], c["caption"]), run) for c in clips]


def measures(sound: np.ndarray, rate: int) -> tuple[np.ndarray, np.ndarray]:
    """Log-mel frames in dB (frames, bands), and their mean change from frame to frame (frames,)."""
    rows = 10 * log_mel_features(sound, rate)
    return rows, np.abs(np.diff(rows, axis=0, prepend=rows[:1])).mean(1)


def phase_statistics(sounds: list, truth: list, plan, rate: int) -> dict[str, float]:
    """Deviation of the frames at seams, in standard deviations between phases."""
    size, shared = plan.sequence.duration, plan.size - np.diff(plan.starts)
    seams = np.array(plan.times[1:]) + shared / plan.size * size / 2  # middles of the overlaps
    period = float(np.mean(np.diff(seams)))
    sums = {name: [[] for _ in range(PHASES)] for name in ("level", "change", "spectrum")}
    for sound, true in zip(sounds, truth):
        pairs = zip(measures(sound, rate), measures(true[: len(sound)], rate))
        rows, change = (ours - theirs for ours, theirs in pairs)
        centres = (np.arange(len(rows)) + 2) * HOP  # frames last 64 ms
        inside = (centres > seams[0] - period / 2) & (centres < seams[-1] + period / 2)
        inside &= (centres > EDGE) & (centres < len(sound) / rate - EDGE)
        nearest = seams[np.abs(centres[:, None] - seams[None]).argmin(1)]
        phase = np.floor((centres - nearest) / period * PHASES + 0.5).astype(int) % PHASES
        for i in range(PHASES):  # phase 0 is the seam
            chosen = inside & (phase == i)
            sums["level"][i].append(rows[chosen].mean(1))
            sums["change"][i].append(change[chosen])
            sums["spectrum"][i].append(rows[chosen])
    found = {}
    for name, phases in sums.items():
        means = np.stack([np.concatenate(phase).mean(0) for phase in phases])
        spread = means[1:].std(0, ddof=1)
        deviation = np.abs(means[0] - means[1:].mean(0)) / spread
        found[name] = round(float(np.max(deviation) if name == "spectrum" else deviation), 2)
        if name != "spectrum":
            found[f"{name}_seam"] = round(float(means[0]), 3)
            found[f"{name}_others"] = round(float(means[1:].mean()), 3)
            found[f"{name}_spread"] = round(float(spread), 3)
    return found


def seams(run: Run, clips: list[dict], all_steps: list[int]) -> None:
    rate, truth = run.codec.sample_rate, read_sounds(clips, run.codec.sample_rate)
    for overlap in (0.0, 0.25, 0.5):
        divided = dataclasses.replace(run, windowing=Windowing(run.sequence.duration, overlap))
        items = encode(divided, clips)
        plan = items[0].windows
        for steps in all_steps:
            found = {"windows": sounds_of(divided, items, steps)}
            if overlap:
                found["separate windows"] = separate_sounds(divided, items, steps)
            for name, sounds in found.items():
                statistics = phase_statistics(sounds, truth, plan, rate)
                harness.print_line(sound=name, overlap=overlap, steps=steps, **statistics)


def cost(run: Run, seconds: float, steps: int) -> None:
    before = harness.peak_memory_bytes()
    started = time.perf_counter()
    item = encode_request(Request("rain", None, "rain"), run, seconds)
    ((_, sound),) = generate(run, [item], sampling.uniform_times(steps), batch_size=8)
    harness.print_line(
        seconds=seconds,
        steps=steps,
        wall_s=round(time.perf_counter() - started, 2),
        sound_mb=round(sound.nbytes / 1e6, 1),
        peak_before_mb=round(before / 1e6),
        peak_mb=round(harness.peak_memory_bytes() / 1e6),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["scores", "seams", "cost"])
    parser.add_argument("--workdir", required=True, help="of a run on Impacts")
    parser.add_argument("--codec", help="codec folder instead of the run's own")
    parser.add_argument("--data", type=Path, help="Impacts clips longer than those of training")
    parser.add_argument("--clips", type=int, help="use so many of them (all)")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--seconds", type=float, default=600.0, help="cost: of the clip")
    args = parser.parse_args()
    run = load_run(args.workdir, codec_folder=args.codec)
    if args.what == "cost":
        cost(run, args.seconds, args.steps[0])
        return
    lines = (args.data / "test_impacts.jsonl").read_text().splitlines()
    clips = read_split(args.data, "test", args.clips or len(lines))
    (scores if args.what == "scores" else seams)(run, clips, args.steps)


if __name__ == "__main__":
    main()

"""Generates sound for the demo's test clips with a run, and scores it."""

import dataclasses
import time
from pathlib import Path

import numpy as np
from absl import logging
from tqdm import tqdm

from vcm_jax.generation.clips import Request, decode, encode_request, generate_latents
from vcm_jax.impacts.scores import Scorer, other_true_sounds

# Times of the samplers. Four steps of equal length are no nearer to the true sounds than one; these
# have the least log-mel distance of six sequences on the validation split.
TIMES = {1: (1.0, 0.0), 4: (1.0, 0.2, 0.1, 0.05, 0.0)}
MIN_CLIPS = 2

TRUE, OTHER, CODEC = "true sound", "another true sound of the same picture", "codec round trip"
ONE, CONTROL = "1 step", "1 step, another clip's video"


def steps_label(count: int) -> str:
    return f"{count} step" + "s" * (count > 1)


@dataclasses.dataclass
class Results:
    """What the page shows.

    Attributes:
      scorer: with the test clips.
      num_train: number of sounds that the material classifier was trained on.
      metrics: by kind of sound.
      sounds: by kind, for the kinds that the page plays.
      seconds: of the network per clip, by number of steps.
      decoding: seconds of the codec per clip.
    """

    scorer: Scorer
    num_train: int
    metrics: dict[str, dict[str, float]]
    sounds: dict[str, list[np.ndarray]]
    seconds: dict[int, float]
    decoding: float


def generate_sounds(loaded, items, steps: int) -> tuple[list[np.ndarray], float, float]:
    """(sounds of items of equal length, seconds of the network and of the codec per clip).

    The seconds are measured after compilation.
    """
    times, batch_size = TIMES[steps], min(16, len(items))
    generate_latents(loaded, items[:batch_size], times, seed=0, batch_size=batch_size)
    started = time.perf_counter()
    latents = generate_latents(loaded, items, times, seed=0, batch_size=batch_size)
    sampled = time.perf_counter()
    sounds = [decode(loaded, item, x, 0) for item, x in zip(items, latents)]
    decoded = time.perf_counter()
    return sounds, (sampled - started) / len(items), (decoded - sampled) / len(items)


def score_run(loaded, data: Path, num_clips: int, num_train: int) -> Results:
    """Generates sound for the test clips and scores it.

    Args:
      loaded: the run.
      data: folder of the Impacts set.
      num_clips: number of test clips.
      num_train: number of training clips whose true sounds train the material classifier.

    Raises:
      ValueError: data that are missing, or too few clips.
    """
    logging.info("reading %d test clips and %d training sounds", num_clips, num_train)
    scorer = Scorer(data, num_clips, num_train, loaded.codec.sample_rate)
    clips, truth, codec = scorer.clips, scorer.truth, loaded.codec
    items = [
        encode_request(Request(c["id"], c["path"], c["caption"]), loaded)
        for c in tqdm(clips, "Encoding test clips", unit="clip")
    ]
    logging.info("scoring true sounds")
    round_trip = [
        codec.decode(codec.encode(sound)[0], seed)[: len(sound)] for seed, sound in enumerate(truth)
    ]
    metrics = {
        TRUE: scorer(truth),
        OTHER: scorer(other_true_sounds(data, clips)),
        CODEC: scorer(round_trip),
    }
    sounds, seconds = {TRUE: truth, CODEC: round_trip}, {}
    for steps in TIMES:
        logging.info("generating and scoring, %s", steps_label(steps))
        name = steps_label(steps)
        sounds[name], seconds[steps], decoding = generate_sounds(loaded, items, steps)
        metrics[name] = scorer(sounds[name])
    # The control compares every sound with the next clip, for whose video it was not made.
    metrics[CONTROL] = scorer(sounds[ONE], clips[1:] + clips[:1])
    return Results(scorer, num_train, metrics, sounds, seconds, decoding)

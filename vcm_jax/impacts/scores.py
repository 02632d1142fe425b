"""Scores of sounds for the simulated world, whose impact times and materials are known."""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from vcm_jax.atomic import read_json
from vcm_jax.impacts.materials import fit_material_classifier, material_accuracy
from vcm_jax.impacts.render import render_sound
from vcm_jax.impacts.scene import MATERIALS, simulate
from vcm_jax.media.read import read_audio
from vcm_jax.metrics import (
    RunningGaussian,
    detect_onsets,
    frechet_distance,
    frechet_standard_error,
    log_mel_features,
    merge_close,
    onset_scores,
    spectral_sharpness,
)


def read_split(data: Path, split: str, count: int) -> list[dict]:
    """The first `count` lines of SPLIT_impacts.jsonl, each with the `path` of its clip.

    Raises:
      ValueError: the split is missing or damaged, or has fewer clips.
    """
    path = data / f"{split}_impacts.jsonl"
    try:
        with path.open(encoding="utf-8") as lines:
            clips = [json.loads(line) for line in itertools.islice(lines, count)]
        for clip in clips:
            clip["path"] = data / split / f"{clip['id']}.mp4"
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: make the data with vcm_jax.impacts") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error})") from None
    if len(clips) < count:
        raise ValueError(f"{path} has {len(clips)} clips, {count} are wanted")
    return clips


def read_sounds(clips: Sequence[Mapping], sample_rate: int) -> list[np.ndarray]:
    """The true sounds (samples,), each as long as its clip's duration."""
    return [
        read_audio(clip["path"], sample_rate, round(clip["duration"] * sample_rate))
        for clip in clips
    ]


def other_true_sounds(data: Path, clips: Sequence[Mapping]) -> list[np.ndarray]:
    """Other sounds of the same pictures, at 16 kHz: other hidden draws of pitch, room and noise."""
    settings = read_json(data / "impacts.json", ["seed"])
    seed, materials = settings["seed"], settings.get("materials", MATERIALS)
    scenes = [
        simulate(seed, "test", int(clip["id"]), clip["duration"], hidden=1, materials=materials)
        for clip in clips
    ]
    return [render_sound(scene) for scene in scenes]


class Scorer:
    """Compares sets of sounds with the true sounds and the known impacts of test clips.

    Attributes:
      clips: the test clips, from `read_split`.
      truth: their true sounds.
    """

    def __init__(
        self, data: Path, num_clips: int, num_train: int, sample_rate: int, num_true: int = 0
    ):
        """Reads test clips and trains the material classifier on true sounds of training clips.

        Args:
          data: folder of the Impacts set.
          num_clips: number of test clips.
          num_train: number of training clips.
          sample_rate: Hz, of all sounds.
          num_true: number of test clips whose true sounds the Frechet distance compares with, at
            least `num_clips`; 0: those of the test clips.

        Raises:
          ValueError: clips that are missing, or too few.
        """
        self.sample_rate = sample_rate
        self.clips = read_split(data, "test", num_clips)
        train = read_split(data, "train", num_train)
        self._classifier = fit_material_classifier(
            read_sounds(train, sample_rate), [clip["impacts"] for clip in train], sample_rate
        )
        self.truth = read_sounds(self.clips, sample_rate)
        further = read_split(data, "test", max(num_true, num_clips))[num_clips:]
        self._further = len(further)
        self._true = RunningGaussian()
        for rows in self._rows([*self.truth, *read_sounds(further, sample_rate)]):
            self._true.update(rows)

    def _rows(self, sounds: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [log_mel_features(sound, self.sample_rate) for sound in sounds]

    def __call__(self, sounds: Sequence[np.ndarray], clips: Sequence[Mapping] | None = None):
        """All metrics of one set of sounds.

        Args:
          sounds: one per clip, at the sample rate.
          clips: the clips that the sounds are compared with; None: the test clips in order.

        Returns:
          precision, recall, f1 and timing_error_ms of `onset_scores`; frechet, the Frechet distance
          of log-mel frames to those of the true sounds, and frechet_error, its standard error with
          other clips; sharpness; material, the share of isolated impacts whose material the
          classifier recognises.
        """
        clips = self.clips if clips is None else clips
        onsets = [merge_close(detect_onsets(sound, self.sample_rate)) for sound in sounds]
        times = [merge_close(np.array([i["time"] for i in clip["impacts"]])) for clip in clips]
        rows = self._rows(sounds)
        joined = np.concatenate(rows)
        same = sounds is self.truth and not self._further
        impacts = [clip["impacts"] for clip in clips]
        return onset_scores(onsets, times) | {
            "frechet": 0.0 if same else frechet_distance(joined, self._true),
            "frechet_error": 0.0 if same else frechet_standard_error(rows, self._true),
            "sharpness": spectral_sharpness(joined),
            "material": material_accuracy(self._classifier, sounds, impacts, self.sample_rate),
        }

"""Are the clips as long as --duration? Asked before anything is fitted or decoded."""

import math
from collections.abc import Sequence

import numpy as np
from absl import logging
from tqdm import tqdm

from vcm_jax.features.work import ExtractError
from vcm_jax.media.clips import Clip
from vcm_jax.media.read import MediaError, probe
from vcm_jax.records.sequence import SequenceConfig

_CLIPS = 400  # so many are looked at, drawn at random
_MOST = 0.9  # the share of the clips that a duration must keep to be proposed


def _usable(clips: Sequence[Clip]) -> np.ndarray:
    """The longest duration in seconds for which each readable clip can be used."""
    found = []
    for clip in tqdm(clips, "Checking lengths", unit="clip"):
        try:
            info = probe(clip.path)
        except (MediaError, OSError):
            continue  # extraction says why
        # The last frame may be missing, see `read_frames`.
        found.append(info.duration + 1 / (info.fps or 25) - clip.start)
    return np.array(found)


def check_lengths(clips: Sequence[Clip], sequence: SequenceConfig) -> None:
    """Compares the lengths of videos, up to 400 of them, with the duration that is asked for.

    Raises:
      ExtractError: none is long enough. If fewer than 90% are, a warning is logged. Either line
        names the longest duration that keeps 90% of the clips.
    """
    order = np.random.default_rng(0).permutation(len(clips))[:_CLIPS]
    longest = _usable([clips[index] for index in order])
    kept = int((longest >= sequence.duration).sum())
    if not len(longest) or kept >= _MOST * len(longest):
        return
    line = (
        f"{len(longest) - kept} of {len(longest)} clips are shorter than --duration="
        f"{sequence.duration:g} s; {_proposal(longest, sequence)}"
    )
    if len(order) < len(clips):
        line += f" ({len(order)} of {len(clips)} clips were looked at)"
    if not kept:
        raise ExtractError(line)
    logging.warning(line)


def _proposal(longest: np.ndarray, sequence: SequenceConfig) -> str:
    """The longest duration, in tenths of a second, that keeps most clips."""
    shortest = sequence.sync_segment / sequence.sync_fps
    wanted = np.sort(longest)[math.floor((1 - _MOST) * len(longest) + 1e-6)]
    duration = math.floor(10 * wanted + 1e-6) / 10
    if duration < shortest:
        return f"most are shorter than {shortest:g} s, the shortest possible"
    return f"--duration={duration:g} keeps {(longest >= duration).sum()} of them"

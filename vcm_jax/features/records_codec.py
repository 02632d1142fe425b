"""The codec of a records folder: copied from another folder, or fitted on the sounds."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from vcm_jax.atomic import atomic_folder
from vcm_jax.codec import copy_codec, fit_linear_codec, load_codec
from vcm_jax.features.work import ExtractError, failure_reason, read_sound
from vcm_jax.media.clips import Clip
from vcm_jax.records.sequence import SequenceConfig

_FIT_CLIPS = 400  # number of sounds that the linear codec is fitted on


def _usable_sounds(
    clips: list[Clip], sequence: SequenceConfig, reasons: list[str]
) -> Iterator[np.ndarray]:
    """Up to _FIT_CLIPS sounds, drawn at random; `reasons` collects why others were passed over."""
    used, order = 0, np.random.default_rng(0).permutation(len(clips))
    with tqdm(total=min(len(clips), _FIT_CLIPS), desc="Fitting the codec", unit="clip") as bar:
        for index in order:
            clip = clips[index]
            try:
                sound = read_sound(clip.path, sequence, 0.0, clip.start)
            except Exception as error:
                reasons.append(failure_reason(clip, error))
                continue
            yield sound
            used += 1
            bar.update()
            if used == _FIT_CLIPS:
                break


def fit_codec(clips: list[Clip], sequence: SequenceConfig):
    """Fit the linear codec on the sounds of up to 400 clips, drawn at random.

    Raises:
      ExtractError: no clip has a usable sound, or the sounds are too short in all.
    """
    reasons = []
    try:
        return fit_linear_codec(_usable_sounds(clips, sequence, reasons))
    except ValueError as error:
        if len(reasons) < len(clips):
            raise ExtractError(f"the codec cannot be fitted: {error}") from error
        raise ExtractError(
            f"none of {len(clips)} clips has a usable sound, the first: {reasons[0]}"
        ) from None


def prepare_codec(out: Path, source, clips: list[Clip], sequence: SequenceConfig):
    """Load the codec in OUT/codec; if there is none, copy it from `source` or fit one.

    Args:
      out: records folder.
      source: codec folder, or None to fit the linear codec.
      clips: to fit it on.
      sequence: lengths of the clips.

    Raises:
      ExtractError: OUT/codec is another codec than `source`, or none can be fitted.
    """
    folder = out / "codec"
    if not folder.exists():
        if source is None:
            with atomic_folder(folder) as temporary:
                fit_codec(clips, sequence).save(temporary)
        else:
            copy_codec(source, folder)
    codec = load_codec(folder)
    if source is not None and codec.fingerprint != load_codec(source).fingerprint:
        raise ExtractError(f"{folder} is not the codec in {source}: use another --out")
    return codec

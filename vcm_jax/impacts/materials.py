"""Does an impact sound like its material? A small classifier, trained on true sounds."""

from collections.abc import Mapping, Sequence

import librosa
import numpy as np
from sklearn.decomposition import PCA
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

_BEFORE, _AFTER = 0.048, 0.16  # seconds of sound around the impact that the classifier sees
_WINDOW, _HOP, _BANDS = 0.032, 0.016, 40  # seconds, seconds, mel bands
_COMPONENTS = 40  # principal components that the classifier keeps
_RANGE = 6.0  # log10 power: values further below the window's maximum are clipped


def material_features(
    audio: np.ndarray, impacts: Sequence[Mapping], sample_rate: int
) -> tuple[np.ndarray, np.ndarray]:
    """Features of a clip's sound at its isolated impacts.

    An impact is isolated if the clip has no other impact from 48 ms before to 160 ms after it, and
    if its sound covers this window. The features are the window's log-mel spectrogram (12 frames of
    40 bands) relative to its maximum, so that they do not depend on loudness.

    Args:
      audio: (samples,).
      impacts: all impacts of the clip, mappings with `time` in seconds and `material`.
      sample_rate: Hz.

    Returns:
      Rows (n, 480) float32 and materials (n,) of the isolated impacts.
    """
    times = np.array([impact["time"] for impact in impacts], float)
    rows, materials = [], []
    for impact in impacts:
        distance = times - impact["time"]
        start = round((impact["time"] - _BEFORE) * sample_rate)
        end = start + round((_BEFORE + _AFTER) * sample_rate)
        alone = np.sum((distance > -_BEFORE) & (distance < _AFTER)) == 1
        if not alone or start < 0 or end > len(audio):
            continue
        power = librosa.feature.melspectrogram(
            y=np.asarray(audio[start:end], np.float32),
            sr=sample_rate,
            n_fft=round(_WINDOW * sample_rate),
            hop_length=round(_HOP * sample_rate),
            n_mels=_BANDS,
            fmax=8000,
            center=False,
        )
        level = np.log10(np.maximum(power, 1e-12))
        rows.append(np.maximum(level - level.max(), -_RANGE).ravel())
        materials.append(impact["material"])
    return np.array(rows, np.float32), np.array(materials)


def _collect(audios, impacts, sample_rate):
    pairs = [
        material_features(audio, clip, sample_rate)
        for audio, clip in zip(audios, impacts, strict=True)
    ]
    pairs = [pair for pair in pairs if len(pair[0])]
    if not pairs:
        raise ValueError("no isolated impact in any clip: the materials cannot be judged")
    return tuple(np.concatenate(arrays) for arrays in zip(*pairs))


def fit_material_classifier(
    audios: Sequence[np.ndarray], impacts: Sequence[Sequence[Mapping]], sample_rate: int
) -> Pipeline:
    """Trains a support vector machine on 40 principal components of `material_features`.

    Args:
      audios: true sounds, one per clip.
      impacts: the impacts of every clip.
      sample_rate: Hz.

    Raises:
      ValueError: fewer than 40 isolated impacts, or fewer than two materials.
    """
    rows, materials = _collect(audios, impacts, sample_rate)
    if len(rows) < _COMPONENTS or len(set(materials)) < 2:
        raise ValueError(
            f"{len(rows)} isolated impacts of {len(set(materials))} materials: the classifier "
            f"needs at least {_COMPONENTS} of 2; give more clips"
        )
    model = make_pipeline(
        StandardScaler(), PCA(_COMPONENTS, whiten=False, random_state=0), SVC(C=10.0)
    )
    return model.fit(rows, materials)


def material_accuracy(
    classifier: Pipeline,
    audios: Sequence[np.ndarray],
    impacts: Sequence[Sequence[Mapping]],
    sample_rate: int,
) -> float:
    """Share of the isolated impacts, over all clips, whose sound has the true material."""
    return float(classifier.score(*_collect(audios, impacts, sample_rate)))

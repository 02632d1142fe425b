"""Does a sound tell its caption? A small classifier, trained on true sounds of other clips."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from vcm_jax.metrics.frechet import log_mel_features

_FOLDS = 5
MIN_CLIPS = 10  # clips that a caption needs to become one of the classes


def caption_features(audio: np.ndarray, sample_rate: int) -> np.ndarray:
    """Features (240,) of a clip: how the level of each of 40 mel bands is distributed over time.

    They are the percentiles 10, 50 and 95, the mean, the standard deviation, and the mean absolute
    step from frame to frame of `log_mel_features`. They do not say when something sounds.
    """
    rows = log_mel_features(audio, sample_rate)
    steps = np.abs(np.diff(rows, axis=0)).mean(0) if len(rows) > 1 else np.zeros(rows.shape[1])
    summary = [np.percentile(rows, q, axis=0) for q in (10, 50, 95)]
    return np.concatenate([*summary, rows.mean(0), rows.std(0), steps])


def caption_accuracy(
    pred: Sequence[np.ndarray],
    truth: Sequence[np.ndarray],
    captions: Sequence[str],
    sample_rate: int,
) -> dict[str, float]:
    """How often a classifier of true sounds finds the clip's caption from the generated sound.

    The classes are the captions of at least 10 clips; other clips are left out. The clips are split
    into 5 folds. A support vector machine that was trained on the true sounds of four folds judges
    the sounds of the fifth. The metric is this project's own, for data whose captions recur, such
    as names of classes.

    Args:
      pred, truth: sounds (samples,), one per clip.
      captions: one per clip.
      sample_rate: Hz.

    Returns:
      accuracy (of the generated sounds), true_accuracy (of the true sounds), chance (the share of
      the most frequent caption), clips and captions (the numbers that these rest on).

    Raises:
      ValueError: the numbers of clips differ, or fewer than two captions have 10 clips.
    """
    if not len(pred) == len(truth) == len(captions):
        raise ValueError(f"{len(pred)} sounds, {len(truth)} true ones, {len(captions)} captions")
    frequent = {c for c, n in Counter(captions).items() if n >= MIN_CLIPS and c}
    used = [i for i, caption in enumerate(captions) if caption in frequent]
    if len(frequent) < 2:
        raise ValueError(
            f"{len(frequent)} captions have {MIN_CLIPS} clips or more, at least 2 are needed"
        )
    labels = np.array([captions[i] for i in used])
    found, true = (
        np.stack([caption_features(sounds[i], sample_rate) for i in used])
        for sounds in (pred, truth)
    )
    folds = StratifiedKFold(_FOLDS, shuffle=True, random_state=0)
    right, true_right = 0, 0
    for train, test in folds.split(true, labels):
        model = make_pipeline(StandardScaler(), SVC(C=10.0)).fit(true[train], labels[train])
        right += np.sum(model.predict(found[test]) == labels[test])
        true_right += np.sum(model.predict(true[test]) == labels[test])
    return {
        "accuracy": float(right / len(used)),
        "true_accuracy": float(true_right / len(used)),
        "chance": max(Counter(labels.tolist()).values()) / len(used),
        "clips": len(used),
        "captions": len(frequent),
    }

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
MIN_CLIPS = 10  # clips of a caption from which on the classifier learns it


def caption_features(audio: np.ndarray, sample_rate: int) -> np.ndarray:
    """(240,) of one clip: how the level of each of 40 mel bands is distributed over time.

    Of the log-mel frames of `log_mel_features`: percentiles 10, 50 and 95, mean, standard
    deviation, and mean step from frame to frame. When something sounds leaves no trace in it.
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

    The captions are its classes: those of at least 10 clips, other clips are left out. Clips are
    dealt into 5 folds; the sounds of each are judged by a support vector machine that was trained
    on the true sounds of the other four. Ours alone, and for data whose captions recur, as the
    names of classes do.

    Args: pred, truth: sounds (samples,), clip by clip; captions: theirs; sample_rate: Hz.

    Returns: accuracy and true_accuracy, of generated and of true sounds, chance, the share of the
    most frequent caption, clips and captions, how many they rest on.

    Raises: ValueError if the numbers of clips differ, or fewer than two captions have 10 clips.
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

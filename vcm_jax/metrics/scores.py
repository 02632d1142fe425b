"""Scores from outputs of pretrained networks: logits and embeddings, one row per clip.

They equal those of av-benchmark (github.com/hkchengrex/av-benchmark), the protocol of the tables of
MMAudio and SoundVCM, computed in float64.
"""

import numpy as np

DESYNC_GRID = np.linspace(-2, 2, 21, dtype=np.float32)  # seconds; Synchformer's classes


def _checked(**arrays) -> list[np.ndarray]:
    """The arrays in float64; a ValueError names one that is empty, not finite, or unlike others."""
    found = {name: np.asarray(array, np.float64) for name, array in arrays.items()}
    first = next(iter(found.values()))
    for name, array in found.items():
        if array.ndim != 2 or not len(array):
            raise ValueError(f"{name} must be (clips, d), one clip at least, got {array.shape}")
        if array.shape != first.shape:
            shapes = ", ".join(f"{name} {array.shape}" for name, array in found.items())
            raise ValueError(f"shapes differ: {shapes}")
        if not np.isfinite(array).all():
            rows = np.sum(~np.isfinite(array).all(1))
            raise ValueError(f"{name} is not finite in {rows} of {len(array)} rows")
    return list(found.values())


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def kl_divergence(pred_logits: np.ndarray, truth_logits: np.ndarray) -> float:
    """Mean over clips of KL(truth || pred) between softmax class probabilities, in nats.

    Args:
      pred_logits, truth_logits: (clips, classes); row i of both belongs to the same clip.

    Raises:
      ValueError: other or differing shapes, or values that are not finite.
    """
    pred, truth = _checked(pred_logits=pred_logits, truth_logits=truth_logits)
    log_p, log_t = _log_softmax(pred), _log_softmax(truth)
    return float(np.mean(np.sum(np.exp(log_t) * (log_t - log_p), axis=1)))


def inception_score(logits: np.ndarray, splits: int = 10, seed: int = 2020) -> tuple[float, float]:
    """Mean and standard deviation of the inception score over chunks (Salimans et al. 2016).

    The score of a chunk is exp(mean over its rows of KL(p(class | row) || p(class))). The rows are
    shuffled and split into `splits` chunks, so that the score depends on their order.

    Args:
      logits: (clips, classes).
      splits: number of chunks.
      seed: of `numpy.random.RandomState`, as in the protocol.

    Raises:
      ValueError: other shapes, values that are not finite, or fewer clips than chunks.
    """
    (logits,) = _checked(logits=logits)
    count = len(logits)
    if count < splits:
        raise ValueError(
            f"an inception score over {splits} chunks needs as many clips, not {count}"
        )
    log_p = _log_softmax(logits[np.random.RandomState(seed).permutation(count)])
    scores = []
    for i in range(splits):
        chunk = log_p[i * count // splits : (i + 1) * count // splits]
        p = np.exp(chunk)
        scores.append(np.exp(np.mean(np.sum(p * (chunk - np.log(p.mean(0))), axis=1))))
    return float(np.mean(scores)), float(np.std(scores))


def cosine_score(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over clips of the cosine between rows of a and b, (clips, d) each.

    With ImageBind's embeddings of video and sound it is the IB score, with CLAP's embeddings of
    caption and sound the CLAP score. It lies in [-1, 1]; papers report the IB score times 100.

    Raises:
      ValueError: other or differing shapes, values that are not finite, or a row of zeros.
    """
    a, b = _checked(a=a, b=b)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    if not norms.all():
        raise ValueError(f"{np.sum(norms == 0)} of {len(norms)} rows are all zeros: no direction")
    return float(np.mean(np.sum(a * b, axis=1) / norms))


def desync(logits_first: np.ndarray, logits_last: np.ndarray) -> float:
    """DeSync: mean absolute offset in seconds between sound and picture, estimated by Synchformer.

    Args:
      logits_first, logits_last: (clips, 21), of the first and the last 4.8 s of each clip; class k
        is an offset of -2 + 0.2 k seconds.

    Raises:
      ValueError: other or differing shapes, or values that are not finite.
    """
    first, last = _checked(logits_first=logits_first, logits_last=logits_last)
    if first.shape[1] != len(DESYNC_GRID):
        raise ValueError(f"offsets have {len(DESYNC_GRID)} classes, got {first.shape[1]}")
    classes = np.concatenate([first.argmax(1), last.argmax(1)])
    return float(np.mean(np.abs(DESYNC_GRID[classes].astype(np.float64))))

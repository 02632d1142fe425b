"""Caches as av-benchmark writes them, of the features that its reference figures were made from."""

from pathlib import Path

import golden
import numpy as np

DATA = golden.DATA / "metrics"
_BOOSTED = ("OFF_tok", "MOD_tok", "pos_emb")


def features(description: dict) -> tuple[dict, dict]:
    """(truth, pred): file -> clip -> array or {layer: array}, each in its own order of clips."""
    base, size, dims = (description[key] for key in ("base_seed", "N", "dims"))
    randn = lambda k, *shape: golden.randn(base + k, shape)
    rows = lambda k, name: randn(k, size, dims[name])
    synced = dims["nsync"]
    truth = {
        "pann_features": {
            "2048": np.maximum(0.5 * rows(0, "pann") - 0.3, 0),
            "logits": -5 + 2 * rows(2, "cls"),
        },
        "vggish_features": 0.5 * randn(4, size, 8, dims["vgg"]),
        "passt_features_embed": rows(6, "passt"),
        "passt_logits": -6 + 2.5 * rows(8, "cls"),
        "imagebind_video": rows(10, "ib"),
        "synchformer_video": randn(12, synced, 24, 8, 768) + 2 * randn(15, synced, 1, 1, 768),
    }
    pred = {
        "pann_features": {
            "2048": np.maximum(0.3 * rows(0, "pann") + 0.45 * rows(1, "pann") - 0.25, 0),
            "logits": -4.8 + 1.4 * rows(2, "cls") + 1.2 * rows(3, "cls"),
        },
        "vggish_features": 0.1
        + 0.3 * randn(4, size, 8, dims["vgg"])
        + 0.35 * randn(5, size, 8, dims["vgg"]),
        "passt_features_embed": 0.05 + 0.7 * rows(6, "passt") + 0.8 * rows(7, "passt"),
        "passt_logits": -5.5 + 1.6 * rows(8, "cls") + 1.6 * rows(9, "cls"),
        "imagebind_audio": 0.4 * rows(10, "ib") + 0.9 * rows(11, "ib"),
        "synchformer_audio": randn(13, synced, 24, 6, 768) + 2 * randn(16, synced, 1, 1, 768),
    }
    unpaired = description["unpaired_last_clip"]

    def by_clip(side, order, last):
        def name(i):
            return last if unpaired and i == size - 1 else f"clip_{i:04d}"

        take = lambda a, i: {k: v[i] for k, v in a.items()} if isinstance(a, dict) else a[i]
        count = lambda a: size if isinstance(a, dict) else len(a)
        return {
            file: {name(i): take(array, i) for i in order if i < count(array)}
            for file, array in side.items()
        }

    return (
        by_clip(truth, range(size), "gt_only"),
        by_clip(pred, description["perm"], "pred_only"),
    )


def write(folder: Path, side: dict) -> Path:
    import torch

    folder.mkdir(parents=True)
    for name, clips in side.items():
        tensors = {
            clip: {key: torch.tensor(array) for key, array in value.items()}
            if isinstance(value, dict)
            else torch.tensor(value)
            for clip, value in clips.items()
        }
        torch.save(tensors, folder / f"{name}.pth")
    return folder


def compare_state_dict(table, boost: bool) -> dict[str, np.ndarray]:
    boosted = [name for name, *_ in table if name.split(".")[-1] in _BOOSTED] if boost else ()
    return golden.fill(table, boosted=boosted)

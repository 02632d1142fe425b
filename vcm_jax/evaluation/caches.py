"""The papers' metrics, from two caches of av-benchmark (see `vcm_jax.evaluate`)."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from vcm_jax import metrics
from vcm_jax.evaluation import synchformer
from vcm_jax.interop.av_benchmark import AUDIO_FILES, clean_sample_name, read_cache
from vcm_jax.interop.state_dict import list_few

_SYNC_BATCH = 16

# Shape of one clip's features from the protocol's extractors, for 8 s.
_SHAPES = {
    "pann_features": (2048,),
    "vggish_features": (8, 128),
    "passt_features_embed": (768,),
    "passt_logits": (527,),
    "imagebind_audio": (1024,),
    "imagebind_video": (1024,),
}


class EvaluateError(ValueError):
    """Sets that cannot be compared as asked; one line."""


class Caches:
    """Two caches of av-benchmark, which are read file by file, and the pairing of their clips.

    Attributes:
      folders: {"pred": folder, "truth": folder}.
      missing: file -> {"pred": clips of pred without a partner, "truth": likewise}.
      notes: what the reader of the metrics should know, one line each.
    """

    def __init__(self, pred, truth, allow_unpaired: bool):
        self.folders = {"pred": Path(pred), "truth": Path(truth)}
        self.allow_unpaired = allow_unpaired
        self.missing, self.notes = {}, []
        for side, folder in self.folders.items():
            there = [name for name in AUDIO_FILES if (folder / f"{name}.pth").exists()]
            if lacking := set(AUDIO_FILES) - set(there):
                raise EvaluateError(
                    f"--{side}={folder}: not a whole cache of av-benchmark, it lacks "
                    + ", ".join(f"{name}.pth" for name in AUDIO_FILES if name in lacking)
                )

    def has(self, side: str, name: str) -> bool:
        return (self.folders[side] / f"{name}.pth").exists()

    def read_both(self, name: str, other: str | None = None, layers: tuple[str, ...] = ()):
        """The features of a file of pred, and of the same or another file of truth."""
        return self.read("pred", name, layers), self.read("truth", other or name, layers)

    def read(self, side: str, name: str, layers: tuple[str, ...] = ()) -> dict:
        """A file's features by clip.

        Raises:
          EvaluateError: features of different shapes, or values that are not finite.
        """
        path = self.folders[side] / f"{name}.pth"
        found = read_cache(path)
        for layer in layers or (None,):
            rows = {}
            for clip, value in found.items():
                if isinstance(value, dict) != (layer is not None) or layer and layer not in value:
                    what = f"layers {', '.join(layers)}" if layers else "one tensor"
                    raise EvaluateError(f"{path}: {clip} does not hold {what} (another extractor?)")
                rows[clip] = value if layer is None else value[layer]
            shapes = {value.shape for value in rows.values()}
            if len(shapes) > 1:
                shown = " and ".join(str(shape) for shape in sorted(shapes)[:2])
                raise EvaluateError(f"{path}: clips have features of shapes {shown}")
            bad = [clip for clip, value in rows.items() if not np.isfinite(value).all()]
            if bad:
                raise EvaluateError(f"{path}: not finite in {len(bad)} clips: {list_few(bad)}")
        self._note_extractor(name, next(iter(found.values())), layers)
        return found

    def _note_extractor(self, name, value, layers):
        wanted = _SHAPES.get(name)
        shape = (value[layers[0]] if layers else value).shape
        note = f"{name}: a clip is {shape}, av-benchmark's extractor for 8 s gives {wanted}"
        if wanted and shape != wanted and note not in self.notes:
            self.notes.append(note)

    def pair(self, pred: dict, truth: dict, names: tuple[str, str], rule: Callable) -> list:
        """[(clip of pred, clip of truth)], in the order of pred.

        Args:
          pred, truth: features by clip.
          names: of the two files, for messages.
          rule: gives the clip of truth for a clip of pred: av-benchmark's file-name rule.

        Raises:
          EvaluateError: clips without a partner, unless they are allowed; two clips of pred with
            the same partner; no pair at all.
        """
        partner = {clip: rule(clip) for clip in pred}
        seen = {}
        for clip, name in partner.items():
            if name in truth and seen.setdefault(name, clip) != clip:
                raise EvaluateError(f"{names[0]}: {seen[name]} and {clip} both mean {name}")
        pairs = [(clip, name) for clip, name in partner.items() if name in truth]
        lacking = {
            "pred": [clip for clip, name in partner.items() if name not in truth],
            "truth": sorted(truth.keys() - seen.keys()),
        }
        if any(lacking.values()):
            shown = "; ".join(
                f"{len(clips)} only in {side}: {list_few(clips)}"
                for side, clips in lacking.items()
                if clips
            )
            renamed = [clip for clip in lacking["pred"] if partner[clip] != clip]
            if renamed:
                shown += (
                    f" (av-benchmark reads {renamed[0]} as {partner[renamed[0]]}, by its length)"
                )
            if not self.allow_unpaired:
                raise EvaluateError(
                    f"{names[0]} of pred and {names[1]} of truth do not pair: {shown}; "
                    "--allow_unpaired scores those that do"
                )
            self.missing[names[0]] = {side: clips for side, clips in lacking.items() if clips}
        if not pairs:
            raise EvaluateError(
                f"{names[0]} of pred and {names[1]} of truth have no clip in common"
            )
        return pairs


def _stack(features: dict, clips) -> np.ndarray:
    return np.stack([features[clip] for clip in clips])


def _layer(features: dict, name: str, clips) -> np.ndarray:
    return np.stack([features[clip][name] for clip in clips])


def _gaussian(rows: Iterable[np.ndarray]) -> metrics.RunningGaussian:
    """The Gaussian of feature rows, some clips at a time: a whole test set needs much memory."""
    gaussian, chunk = metrics.RunningGaussian(), []
    for value in rows:
        chunk.append(np.atleast_2d(value))
        if len(chunk) == 1024:
            gaussian.update(np.concatenate(chunk))
            chunk = []
    return gaussian.update(np.concatenate(chunk)) if chunk else gaussian


@dataclasses.dataclass
class Scores:
    """Metrics by av-benchmark's names, and what they rest on.

    Attributes:
      values: name -> value.
      clips, truth_clips: name -> number of clips of either side.
      left_out: name -> reason.
    """

    values: dict[str, float] = dataclasses.field(default_factory=dict)
    clips: dict[str, int] = dataclasses.field(default_factory=dict)
    truth_clips: dict[str, int] = dataclasses.field(default_factory=dict)
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)

    def add(self, name: str, value: float, count: int, truth_count: int | None = None) -> None:
        self.values[name], self.clips[name] = value, count
        self.truth_clips[name] = count if truth_count is None else truth_count

    def add_distance(self, name: str, found, wanted, counts: tuple[int, int]) -> None:
        if min(counts) < 2:
            raise EvaluateError(f"{name} compares sets: {counts[0]} and {counts[1]} clips are few")
        with _named(name):
            self.add(name, metrics.frechet_distance(found, wanted), *counts)

    def add_divergence(self, name: str, found: np.ndarray, wanted: np.ndarray) -> None:
        with _named(name):
            self.add(name, metrics.kl_divergence(found, wanted), len(found))

    def add_inception(self, name: str, logits: np.ndarray) -> None:
        try:
            mean, std = metrics.inception_score(logits)
        except ValueError as error:
            self.left_out[f"{name}-mean"] = str(error)
            return
        self.add(f"{name}-mean", mean, len(logits))
        self.add(f"{name}-std", std, len(logits))


@contextlib.contextmanager
def _named(name: str):
    """Puts the metric's name before what is wrong with its features."""
    try:
        yield
    except ValueError as error:
        raise EvaluateError(f"{name}: {error} (another extractor?)") from None


def evaluate_caches(
    pred, truth, synchformer_path=None, allow_unpaired: bool = False
) -> dict[str, dict]:
    """The metrics of av-benchmark's protocol from two of its caches.

    FD-VGG, FD-PANN and ISC-PANNS use all clips of a side; the other metrics use paired clips.

    Args:
      pred, truth: folders of the caches, of the generated and of the true sounds.
      synchformer_path: `synchformer_state_dict.pth`; None leaves DeSync out.
      allow_unpaired: score the clips that pair, and report the others.

    Returns:
      {"metrics": {name: value}, "clips": {name: number of clips}, "truth_clips": likewise on the
      side of truth, "missing": see `Caches`, "left_out": {metric: reason}, "notes": lines}; the
      names are av-benchmark's.

    Raises:
      EvaluateError, StateDictError: files that are missing or do not fit together, clips that do
        not pair, or too few clips.
    """
    caches, scores = Caches(pred, truth, allow_unpaired), Scores()
    params = synchformer.load_compare(synchformer_path) if synchformer_path else None
    _score_pann(caches, scores)
    _score_vggish(caches, scores)
    _score_passt(caches, scores)
    _score_scene(caches, scores, params)
    if len(numbers := sorted({*scores.clips.values(), *scores.truth_clips.values()})) > 1:
        caches.notes.append(f"metrics rest on different numbers of clips: {numbers}")
    return {
        "metrics": scores.values,
        "clips": scores.clips,
        "truth_clips": scores.truth_clips,
        "missing": caches.missing,
        "left_out": scores.left_out,
        "notes": caches.notes,
    }


def _same(clip: str) -> str:
    return clip


def _score_pann(caches: Caches, scores: Scores) -> None:
    found, wanted = caches.read_both("pann_features", layers=("2048", "logits"))
    pairs = caches.pair(found, wanted, ("pann_features",) * 2, _same)
    counts = len(found), len(wanted)
    scores.add_distance(
        "FD-PANN", _layer(found, "2048", found), _layer(wanted, "2048", wanted), counts
    )
    one, other = zip(*pairs)
    scores.add_divergence(
        "KL-PANNS-softmax", _layer(found, "logits", one), _layer(wanted, "logits", other)
    )
    scores.add_inception("ISC-PANNS", _layer(found, "logits", found))


def _score_vggish(caches: Caches, scores: Scores) -> None:
    found, wanted = caches.read_both("vggish_features")
    caches.pair(found, wanted, ("vggish_features",) * 2, _same)
    sides = [_gaussian(features.values()) for features in (found, wanted)]
    scores.add_distance("FD-VGG", *sides, (len(found), len(wanted)))


def _score_passt(caches: Caches, scores: Scores) -> None:
    for name in ("passt_features_embed", "passt_logits"):
        found, wanted = caches.read_both(name)
        one, other = zip(*caches.pair(found, wanted, (name,) * 2, clean_sample_name))
        found, wanted = _stack(found, one), _stack(wanted, other)
        if name == "passt_logits":
            scores.add_divergence("KL-PASST-softmax", found, wanted)
            scores.add_inception("ISC-PASST", found)
        else:
            scores.add_distance("FD-PASST", found, wanted, (len(found), len(wanted)))


def _score_scene(caches: Caches, scores: Scores, params: dict | None) -> None:
    """Scores of sounds against pictures or captions, as far as their features are there."""
    for name, ours, theirs in (
        ("IB-Score", "imagebind_audio", "imagebind_video"),
        ("LAION-CLAP-Score", "clap_laion_audio", "clap_laion_text"),
        ("MS-CLAP-Score", "clap_ms_audio", "clap_ms_text"),
        ("DeSync", "synchformer_audio", "synchformer_video"),
    ):
        files = (("pred", ours), ("truth", theirs))
        lacking = [f"{file}.pth of {side}" for side, file in files if not caches.has(side, file)]
        if lacking:
            scores.left_out[name] = f"no {' and no '.join(lacking)}"
            continue
        if name == "DeSync" and params is None:
            scores.left_out[name] = "needs --synchformer=synchformer_state_dict.pth"
            continue
        found, wanted = caches.read_both(ours, theirs)
        one, other = zip(*caches.pair(found, wanted, (ours, theirs), clean_sample_name))
        with _named(name):
            if name == "DeSync":
                value = metrics.desync(*_offsets(params, found, wanted, one, other))
            else:
                rows = [_stack(*side) for side in ((wanted, other), (found, one))]
                value = metrics.cosine_score(*(side.reshape(len(one), -1) for side in rows))
        scores.add(name, value, len(one))


def _offsets(params, audio, video, ours, theirs) -> tuple[np.ndarray, np.ndarray]:
    """Offset logits of the first and the last 14 segments of every clip, (clips, 21) each."""
    first, last, size = [], [], synchformer.SEGMENTS
    for start in tqdm(range(0, len(ours), _SYNC_BATCH), desc="DeSync", unit="batch"):
        batch = slice(start, start + _SYNC_BATCH)
        sound, sight = _stack(audio, ours[batch]), _stack(video, theirs[batch])
        first.append(synchformer.offset_logits(params, sight[:, :size], sound[:, :size]))
        last.append(synchformer.offset_logits(params, sight[:, -size:], sound[:, -size:]))
    return np.concatenate(first), np.concatenate(last)

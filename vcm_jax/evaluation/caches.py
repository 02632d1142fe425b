"""The papers' figures, from two caches of av-benchmark (see `vcm_jax.evaluate`)."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from vcm_jax import metrics
from vcm_jax.evaluation import synchformer as sync_compare
from vcm_jax.interop.av_benchmark import AUDIO_FILES, clean_sample_name, read_cache
from vcm_jax.interop.state_dict import list_few

_SYNC_BATCH = 16

# Shape of one clip's features as the protocol's extractors make them for 8 s.
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
    """Two caches of av-benchmark, read file by file, and what of them can be paired.

    Attributes:
      missing: file -> {"pred": clips of pred without a partner, "truth": ...}.
      notes: what the reader of the figures should know, one line each.
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

    def read(self, side: str, name: str, layers: tuple[str, ...] = ()) -> dict:
        """A file's features by clip, of one shape and finite.

        Raises:
          EvaluateError: clips of other shapes or with values that are not finite.
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
        """[(clip of pred, clip of truth)], in the order of pred, by av-benchmark's file-name rule.

        Raises:
          EvaluateError: clips without a partner, unless they are allowed; two of pred that mean
            the same clip of truth; no pair at all.
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
                    "--allow_unpaired makes figures of those that do"
                )
            self.missing[names[0]] = {side: clips for side, clips in lacking.items() if clips}
        if not pairs:
            raise EvaluateError(
                f"{names[0]} of pred and {names[1]} of truth have no clip in common"
            )
        return pairs


def _stack(features: dict, clips) -> np.ndarray:
    return np.stack([features[clip] for clip in clips])


def evaluate_caches(pred, truth, synchformer=None, allow_unpaired: bool = False) -> dict:
    """The figures of av-benchmark's protocol from two of its caches.

    Features of all clips of a side make FD-VGG, FD-PANN and ISC-PANNS, paired clips the others.

    Args:
      pred, truth: folders of the caches, of the generated and of the true sounds.
      synchformer: path of `synchformer_state_dict.pth`; None leaves DeSync out.
      allow_unpaired: make figures of the clips that pair, and report the others.

    Returns:
      {"figures": {name: value}, "clips": {name: clips it rests on}, "truth_clips": likewise on the
      side of truth, "missing", "left_out": {name: reason}, "notes"}; names are av-benchmark's.

    Raises:
      EvaluateError, StateDictError: files missing or unlike, clips that do not pair, too few.
    """
    caches = Caches(pred, truth, allow_unpaired)
    exact = lambda clip: clip
    params = sync_compare.load_compare(synchformer) if synchformer else None
    figures, clips, truth_clips, left_out = {}, {}, {}, {}

    def add(name, value, count, truth_count=None):
        figures[name], clips[name] = value, count
        truth_clips[name] = count if truth_count is None else truth_count

    def both(name, other=None, layers=()):
        return caches.read("pred", name, layers), caches.read("truth", other or name, layers)

    def distance(name, found, wanted, counts):
        if min(counts) < 2:
            raise EvaluateError(f"{name} compares sets: {counts[0]} and {counts[1]} clips are few")
        try:
            add(name, metrics.frechet_distance(found, wanted), *counts)
        except ValueError as error:
            raise EvaluateError(f"{name}: {error} (another extractor?)") from None

    def inception(name, logits):
        try:
            mean, std = metrics.inception_score(logits)
        except ValueError as error:
            left_out[f"{name}-mean"] = str(error)
            return
        add(f"{name}-mean", mean, len(logits))
        add(f"{name}-std", std, len(logits))

    def divergence(name, found, wanted):
        try:
            add(name, metrics.kl_divergence(found, wanted), len(found))
        except ValueError as error:
            raise EvaluateError(f"{name}: {error} (another extractor?)") from None

    def gaussian(rows):
        running = metrics.RunningGaussian()
        chunk = []
        for value in rows:  # a few at a time: the features of a whole test set are large
            chunk.append(np.atleast_2d(value))
            if len(chunk) == 1024:
                running.update(np.concatenate(chunk))
                chunk = []
        return running.update(np.concatenate(chunk)) if chunk else running

    # Every clip of a side, then the pairs.
    found, wanted = both("pann_features", layers=("2048", "logits"))
    counts = len(found), len(wanted)
    pairs = caches.pair(found, wanted, ("pann_features",) * 2, exact)
    layer = lambda features, name, clips: np.stack([features[clip][name] for clip in clips])
    distance("FD-PANN", layer(found, "2048", found), layer(wanted, "2048", wanted), counts)
    one, other = zip(*pairs)
    divergence("KL-PANNS-softmax", layer(found, "logits", one), layer(wanted, "logits", other))
    inception("ISC-PANNS", layer(found, "logits", found))

    found, wanted = both("vggish_features")
    caches.pair(found, wanted, ("vggish_features",) * 2, exact)
    sides = [gaussian(features.values()) for features in (found, wanted)]
    distance("FD-VGG", *sides, (len(found), len(wanted)))

    for name in ("passt_features_embed", "passt_logits"):
        found, wanted = both(name)
        one, other = zip(*caches.pair(found, wanted, (name,) * 2, clean_sample_name))
        found, wanted = _stack(found, one), _stack(wanted, other)
        if name == "passt_logits":
            divergence("KL-PASST-softmax", found, wanted)
            inception("ISC-PASST", found)
        else:
            distance("FD-PASST", found, wanted, (len(found), len(wanted)))

    for name, ours, theirs in (
        ("IB-Score", "imagebind_audio", "imagebind_video"),
        ("LAION-CLAP-Score", "clap_laion_audio", "clap_laion_text"),
        ("MS-CLAP-Score", "clap_ms_audio", "clap_ms_text"),
        ("DeSync", "synchformer_audio", "synchformer_video"),
    ):
        files = (("pred", ours), ("truth", theirs))
        if lacking := [
            f"{file}.pth of {side}" for side, file in files if not caches.has(side, file)
        ]:
            left_out[name] = f"no {' and no '.join(lacking)}"
            continue
        if name == "DeSync" and params is None:
            left_out[name] = "needs --synchformer=synchformer_state_dict.pth"
            continue
        found, wanted = both(ours, theirs)
        one, other = zip(*caches.pair(found, wanted, (ours, theirs), clean_sample_name))
        try:
            if name == "DeSync":
                logits = _offsets(params, found, wanted, one, other)
                add(name, metrics.desync(*logits), len(one))
            else:
                flat = lambda features, clips: _stack(features, clips).reshape(len(clips), -1)
                add(name, metrics.cosine_score(flat(wanted, other), flat(found, one)), len(one))
        except ValueError as error:
            raise EvaluateError(f"{name}: {error} (another extractor?)") from None
    if len(numbers := sorted({*clips.values(), *truth_clips.values()})) > 1:
        caches.notes.append(f"figures rest on different numbers of clips: {numbers}")
    return {
        "figures": figures,
        "clips": clips,
        "truth_clips": truth_clips,
        "missing": caches.missing,
        "left_out": left_out,
        "notes": caches.notes,
    }


def _offsets(params, audio, video, ours, theirs) -> tuple[np.ndarray, np.ndarray]:
    """Offset logits of the first and the last 14 segments of every clip, (clips, 21) each."""
    first, last, size = [], [], sync_compare.SEGMENTS
    for start in tqdm(range(0, len(ours), _SYNC_BATCH), desc="DeSync", unit="batch"):
        batch = slice(start, start + _SYNC_BATCH)
        sound, sight = _stack(audio, ours[batch]), _stack(video, theirs[batch])
        first.append(sync_compare.offset_logits(params, sight[:, :size], sound[:, :size]))
        last.append(sync_compare.offset_logits(params, sight[:, -size:], sound[:, -size:]))
    return np.concatenate(first), np.concatenate(last)

"""The papers' metrics from caches, and our own from sounds: against references, and refusals."""

import argparse
import json
import os

import caches
import golden
import numpy as np
import pytest
import soundfile
from commands import run_command

from vcm_jax import evaluate
from vcm_jax.evaluation import synchformer
from vcm_jax.evaluation.caches import EvaluateError
from vcm_jax.interop.av_benchmark import clean_sample_name
from vcm_jax.interop.state_dict import StateDictError
from vcm_jax.media.names import output_name

torch = pytest.importorskip("torch")
RATE = 16_000


def ask(pred, truth, **changes):
    given = dict(synchformer=None, captions=None, duration=0.0, allow_unpaired=False)
    return evaluate.evaluate(argparse.Namespace(pred=pred, truth=truth, **given | changes))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Caches of the small reference, whose last clips do not pair, and Synchformer's file."""
    folder = tmp_path_factory.mktemp("caches")
    description, arrays = golden.load(caches.DATA, "metrics_small_unpaired")
    truth, pred = caches.features(description)
    table = json.loads((caches.DATA / "compare_state_dict.json").read_text())
    state = caches.compare_state_dict(table, boost=True)
    # The real file holds the extractors beside the comparing part.
    state["vfeat_extractor.cls_token"] = np.zeros((1, 1, 768), np.float32)
    torch.save({k: torch.tensor(v) for k, v in state.items()}, folder / "synchformer.pth")
    return {
        "description": description,
        "arrays": arrays,
        "features": (pred, truth),
        "folders": (caches.write(folder / "pred", pred), caches.write(folder / "truth", truth)),
        "synchformer": folder / "synchformer.pth",
    }


def test_the_protocol_on_its_own_files(small):
    result, table = ask(
        *small["folders"], allow_unpaired=True, synchformer=str(small["synchformer"])
    )
    reference = small["description"]["metrics_reference"]
    assert set(result["metrics"]) == set(reference)
    for name, value in reference.items():
        tolerance = 1e-4 if name.startswith("FD") else 1e-6
        assert result["metrics"][name] == pytest.approx(value, rel=tolerance), name
    assert result["clips"] == {
        "FD-PANN": 60,
        "KL-PANNS-softmax": 59,
        "ISC-PANNS-mean": 60,
        "ISC-PANNS-std": 60,
        "FD-VGG": 60,
        "FD-PASST": 59,
        "KL-PASST-softmax": 59,
        "ISC-PASST-mean": 59,
        "ISC-PASST-std": 59,
        "IB-Score": 59,
        "DeSync": 20,
    }
    assert result["missing"]["passt_logits"] == {"pred": ["pred_only"], "truth": ["gt_only"]}
    assert list(result["left_out"]) == ["LAION-CLAP-Score", "MS-CLAP-Score"]
    assert "not" not in result["left_out"]["MS-CLAP-Score"] and "0.632" in table
    assert any("2048" in note for note in result["notes"]), "narrow features are pointed out"
    without, _ = ask(*small["folders"], allow_unpaired=True)
    assert "DeSync" not in without["metrics"] and "--synchformer" in without["left_out"]["DeSync"]


def test_sets_that_do_not_pair_are_refused(small):
    with pytest.raises(EvaluateError, match="1 only in pred: pred_only; 1 only in truth: gt_only"):
        ask(*small["folders"])


@pytest.mark.parametrize("name", ["metrics_small_unpaired", "metrics_full"])
def test_the_comparing_transformer(name):
    description, arrays = golden.load(caches.DATA, name)
    table = json.loads((caches.DATA / "compare_state_dict.json").read_text())
    params = caches.compare_state_dict(table, description["posboost"])
    few = dict(pann=1, cls=1, vgg=1, passt=1, ib=1, nsync=description["dims"]["nsync"])
    truth, pred = caches.features(description | {"dims": few})
    ids = list(truth["synchformer_video"])[:4]
    video, audio = (
        np.stack([side[clip] for clip in ids])
        for side in (truth["synchformer_video"], pred["synchformer_audio"])
    )
    for part, which in ((slice(0, 14), "first14"), (slice(-14, None), "last14")):
        logits = synchformer.offset_logits(params, video[:, part], audio[:, part])
        assert golden.relative_error(logits, arrays[f"desync_logits_{which}"][:4]) < 1e-4
        assert logits.argmax(1).tolist() == description[f"desync_classes_{which}"][:4]
    with pytest.raises(ValueError, match="video features must be"):
        synchformer.offset_logits(params, video, audio)


def test_the_file_name_rule():
    cases = json.loads((caches.DATA / "clean_sample_name_cases.json").read_text())
    for name, cleaned in cases.items():
        assert clean_sample_name(name) == cleaned


def tiny(clips, seed=0, **changes):
    """One side's features of some clips."""
    rng = np.random.default_rng(seed)
    make = lambda *shape: {clip: rng.standard_normal(shape).astype(np.float32) for clip in clips}
    layers = lambda: {
        clip: {
            "2048": rng.standard_normal(6).astype(np.float32),
            "logits": rng.standard_normal(5).astype(np.float32),
        }
        for clip in clips
    }
    found = {
        "pann_features": layers(),
        "vggish_features": make(8, 4),
        "passt_features_embed": make(3),
        "passt_logits": make(5),
        "imagebind_audio": make(7),
        "imagebind_video": make(7),
        "clap_laion_audio": make(7),
        "clap_laion_text": make(1, 7),
    }
    return found | changes


CLIPS = [f"c{i}" for i in range(12)]
YOUTUBE = [f"zxpo56cpU{i:02d}_000007" for i in range(12)]


def test_names_that_only_the_rule_pairs(tmp_path):
    pred = caches.write(tmp_path / "pred", tiny([f"{clip}-0" for clip in YOUTUBE]))
    truth = caches.write(tmp_path / "truth", tiny(YOUTUBE, 1))
    with pytest.raises(EvaluateError, match="pann_features .* do not pair"):
        ask(pred, truth)
    same = caches.write(tmp_path / "same", tiny([f"{clip}-0" for clip in YOUTUBE], 2))
    with pytest.raises(EvaluateError, match=r"reads zxpo56cpU00_000007-0 as .*, by its length"):
        ask(pred, same)
    both = tiny([YOUTUBE[0], f"{YOUTUBE[0]}-0"])
    both["pann_features"] = tiny(YOUTUBE[:2])["pann_features"]
    both["vggish_features"] = tiny(YOUTUBE[:2])["vggish_features"]
    both = caches.write(tmp_path / "both", both)
    with pytest.raises(EvaluateError, match="both mean zxpo56cpU00_000007"):
        ask(both, caches.write(tmp_path / "two", tiny(YOUTUBE[:2])))


def test_caches_that_cannot_be_used(tmp_path):
    good = caches.write(tmp_path / "good", tiny(CLIPS))
    number = iter(range(99))

    def refused(message, error=EvaluateError, **changes):
        bad = caches.write(tmp_path / str(next(number)), tiny(CLIPS, 1, **changes))
        with pytest.raises(error, match=message) as caught:
            ask(bad, good)
        assert "\n" not in str(caught.value)

    nan = tiny(CLIPS)["passt_logits"] | {"c3": np.full(5, np.nan, np.float32)}
    refused("passt_logits.pth: not finite in 1 clips: c3", passt_logits=nan)
    wide = {clip: np.zeros(9, np.float32) for clip in CLIPS}
    refused("FD-PASST: widths differ", passt_features_embed=wide)
    mixed = tiny(CLIPS)["vggish_features"] | {"c1": np.zeros((7, 4), np.float32)}
    refused(r"clips have features of shapes \(7, 4\) and \(8, 4\)", vggish_features=mixed)
    refused("does not hold layers 2048, logits", pann_features=tiny(CLIPS)["passt_logits"])
    refused(
        "IB-Score: 12 of 12 rows are all zeros",
        imagebind_audio={clip: np.zeros(7, np.float32) for clip in CLIPS},
    )
    one = [caches.write(tmp_path / side, tiny(["a"], i)) for i, side in enumerate(("o", "p"))]
    with pytest.raises(EvaluateError, match="FD-PANN compares sets: 1 and 1 clips are few"):
        ask(*one)
    few = [caches.write(tmp_path / side, tiny(CLIPS[:4], i)) for i, side in enumerate(("q", "r"))]
    result, _ = ask(*few)
    assert "as many clips, not 4" in result["left_out"]["ISC-PANNS-mean"]
    assert result["clips"]["FD-VGG"] == 4 and "ISC-PANNS-mean" not in result["metrics"]
    assert "LAION-CLAP-Score" in result["metrics"]
    (good / "vggish_features.pth").write_bytes(b"PK garbage")
    with pytest.raises(StateDictError, match="truncated"):
        ask(few[0], good, allow_unpaired=True)
    (good / "vggish_features.pth").unlink()
    with pytest.raises(EvaluateError, match="lacks vggish_features.pth"):
        ask(few[0], good)


def write_sounds(folder, sounds, rate=RATE):
    folder.mkdir()
    for name, sound in sounds.items():
        soundfile.write(folder / f"{name}.wav", sound, rate, subtype="FLOAT")
    return folder


def clicks(seed, seconds=1.0):
    rng = np.random.default_rng(seed)
    sound = 1e-3 * rng.standard_normal(round(seconds * RATE))
    for start in rng.choice(np.arange(2, 9), 3, replace=False) * 1600:
        sound[start : start + 2000] += 0.5 * np.exp(-np.arange(2000) / 300)[: len(sound) - start]
    return np.float32(sound)


def test_sounds_and_their_captions(tmp_path):
    truth = {f"s{i}": clicks(i) for i in range(24)}
    hum = np.float32(0.3 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE))
    truth |= {f"h{i}": hum * (1 + 0.01 * i) for i in range(12)}
    rows = [f"{name}\t{'a click' if name[0] == 's' else 'a hum'}" for name in truth]
    (tmp_path / "captions.tsv").write_text("\n".join(["id\tcaption", *rows]))
    quieter = {name: np.stack([0.5 * sound, 0.5 * sound], 1) for name, sound in truth.items()}
    truth, pred = (
        write_sounds(tmp_path / "truth", truth),
        write_sounds(tmp_path / "pred", quieter),
    )
    result, table = ask(pred, truth, captions=str(tmp_path / "captions.tsv"))
    found = result["metrics"]
    assert found["loudness_error_db"] == pytest.approx(20 * np.log10(2), abs=0.01)
    assert found["spectral_convergence"] == pytest.approx(0.5, abs=1e-4)
    assert found["onset_f1"] > 0.95 and found["onset_timing_error_ms"] < 2
    assert found["caption_accuracy"] == found["caption_true_accuracy"] == 1
    assert found["caption_chance"] == pytest.approx(2 / 3) and "onset F1" in table
    assert set(result["clips"].values()) == {36} and not result["missing"]


@pytest.mark.parametrize(
    "sounds, changes, message",
    [
        ({"a": clicks(0)}, {}, "1 only in truth: b"),
        (
            {"a": clicks(0)},
            {"allow_unpaired": True},
            "have 1 clips in common",
        ),
        ({"x": clicks(0), "b": clicks(0)}, {}, "1 only in pred: x; 1 only in truth: a"),
        ({"a": clicks(0, 2), "b": clicks(1, 2)}, {}, "2.00 s, the true sound .* give --duration"),
        (
            {"a": clicks(0), "b": clicks(1)},
            {"duration": 3.0},
            "a.wav: 1.00 s of sound, shorter than the 3 s",
        ),
        ({"a": clicks(0), "b": np.full(RATE, np.nan, "f4")}, {}, "b.wav.* are NaN or infinite"),
        ({"a": clicks(0, 0.05), "b": clicks(1)}, {}, "give --duration"),
        ({"a": clicks(0), "b": clicks(1)}, {"synchformer": "x.pth"}, "is for caches"),
    ],
)
def test_sounds_that_cannot_be_compared(tmp_path, sounds, changes, message):
    truth = write_sounds(tmp_path / "truth", {"a": clicks(2), "b": clicks(3)})
    pred = write_sounds(tmp_path / "pred", sounds)
    with pytest.raises(ValueError, match=message) as caught:
        ask(pred, truth, **changes)
    assert "\n" not in str(caught.value)


def test_folders_of_two_kinds(tmp_path, small):
    sounds = write_sounds(tmp_path / "sounds", {"a": clicks(2), "b": clicks(3)})
    for pred, truth, message in (
        (sounds, small["folders"][0], "is not: compare two caches"),
        (sounds, tmp_path / "nowhere", "no such folder"),
        (sounds, sounds, "the same folder"),
        (small["folders"][0], small["folders"][0], "the same folder"),
    ):
        with pytest.raises(EvaluateError, match=message):
            ask(pred, truth)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no files that end in"):
        ask(sounds, tmp_path / "empty")


@pytest.mark.parametrize(
    "name", ["x.mp4", "v1.0", "a b", "100%", "a%20b", "sub/x", "take-1:2", "u\u0308", "-rf"]
)
def test_the_output_for_a_clip_pairs_with_the_clip(tmp_path, name):
    """Ids that are names of files, with or without their suffix."""
    truth = tmp_path / "truth" / f"{name.removesuffix('.mp4')}.wav"
    pred = tmp_path / "pred" / f"{output_name(name)}.wav"
    for seed, path in enumerate((truth, pred)):
        path.parent.mkdir(parents=True)
        soundfile.write(path, clicks(seed), RATE)
        soundfile.write(path.parents[name.count("/")] / "other.wav", clicks(5), RATE)
    result, _ = ask(tmp_path / "pred", tmp_path / "truth")
    assert not result["missing"] and set(result["clips"].values()) == {2}


def test_a_list_pairs_files_by_its_ids(tmp_path):
    """The truth has names of its own; what was generated has those of the ids."""
    write_sounds(tmp_path / "truth", {"vid_a": clicks(0), "vid_b": clicks(1)})
    write_sounds(tmp_path / "pred", {"a": clicks(2), "%2E.b": clicks(3)})
    table = tmp_path / "list.tsv"
    table.write_text("id\tcaption\tfile\na\tx\tvid_a\n..b\ty\tvid_b\n")
    with pytest.raises(EvaluateError, match="do not pair"):
        ask(tmp_path / "pred", tmp_path / "truth")
    result, _ = ask(tmp_path / "pred", tmp_path / "truth", captions=str(table))
    assert not result["missing"] and result["clips"]["onset_f1"] == 2


def test_two_files_of_one_clip_are_refused(tmp_path):
    write_sounds(tmp_path / "truth", {"a": clicks(0), "b": clicks(1)})
    write_sounds(tmp_path / "pred", {"a": clicks(0), "a.wav": clicks(1), "b": clicks(1)})
    with pytest.raises(EvaluateError, match="a.wav and .* name one clip"):
        ask(tmp_path / "pred", tmp_path / "truth", allow_unpaired=True)


def test_a_clip_that_cannot_be_compared_costs_no_other(tmp_path):
    sounds = {name: clicks(i) for i, name in enumerate("abcd")}
    truth = write_sounds(tmp_path / "truth", sounds)
    pred = write_sounds(tmp_path / "pred", sounds | {"a": clicks(0, 2.0)})
    (pred / "b.wav").write_bytes(b"no sound")
    out = tmp_path / "out.json"
    arguments = [f"--pred={pred}", f"--truth={truth}"]
    done = run_command(evaluate, *arguments)
    assert done.code == 1 and done.err.splitlines()[-1].startswith("error: ")
    done = run_command(evaluate, *arguments, "--allow_unpaired", f"--json={out}")
    assert done.code == 3, done.err
    assert "left out: a: " in done.out and "left out: b: " in done.out
    content = json.loads(out.read_text())
    assert content["clips"]["onset_f1"] == 2 and set(content["failed"]) == {"a", "b"}
    assert content["onset_f1"] == 1 and content["protocol"] == "vcm_jax, waveforms alone"
    (pred / "c.wav").unlink()
    done = run_command(evaluate, *arguments, "--allow_unpaired")
    assert done.code == 1 and "fewer than 2 clips can be compared" in done.err


@pytest.mark.parametrize("duration", ["inf", "1e400", "nan", "-1", "x"])
def test_durations_that_are_no_lengths(tmp_path, duration):
    done = run_command(evaluate, "--pred=a", "--truth=b", f"--duration={duration}")
    assert done.code == 1 and "duration" in done.err and done.err.count("\n") == 1


@pytest.mark.parametrize("json_flag", ["", "nowhere/x.json", ".", "pipe"])
def test_bad_flags_end_before_any_work(tmp_path, json_flag, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    truth = write_sounds(tmp_path / "truth", {"a": clicks(2), "b": clicks(3)})
    pred = write_sounds(tmp_path / "pred", {"a": clicks(2), "b": clicks(3)})
    monkeypatch.setattr(evaluate, "evaluate", None)
    flag = f"--json={tmp_path / json_flag}" if json_flag else "stray"
    done = run_command(evaluate, f"--pred={pred}", f"--truth={truth}", flag)
    assert done.code == 1 and done.err.count("\n") == 1 and "error: " in done.err

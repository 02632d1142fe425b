"""The time of steps, steps that are not finite, and what is written for TensorBoard."""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clu import metrics as clu_metrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vcm_jax.models import MODELS
from vcm_jax.objectives.reflow import ReflowConfig
from vcm_jax.training import monitor
from vcm_jax.training.rows import StepConfig, abstract_batch
from vcm_jax.training.writer import Writer, spectrogram


def metrics(loss=1.0, grad_norm=2.0):
    average = clu_metrics.Average.from_model_output
    bad = float(not np.isfinite(loss + grad_norm))
    values = {"loss": loss, "mse": loss, "grad_norm": grad_norm, "nonfinite": bad}
    averages = {name: average(jnp.asarray(value)) for name, value in values.items()}
    return clu_metrics.Collection.create_collection(**averages)


def make_meter(tmp_path, on_nonfinite, size=3):
    ids = lambda step: [f"step{step}row{row}" for row in range(size)]
    return monitor.Meter(10, on_nonfinite, ids, tmp_path / "nonfinite.jsonl")


def test_time_is_split_and_averages_are_taken(tmp_path):
    meter = make_meter(tmp_path, "stop")
    for loss in (1.0, 3.0):
        meter.add(metrics(loss))
        with meter.waiting("data_wait"):
            time.sleep(0.02)
        with meter.waiting("pause"):
            time.sleep(0.2)
    values, seconds = meter.collect()
    assert values["train/loss"] == 2 and values["train/skipped_steps"] == 0
    assert "train/nonfinite" not in values
    assert values["speed/data_wait_ms"] >= 20
    parts = sum(values[f"speed/{name}_ms"] for name in ("data_wait", "device", "host"))
    np.testing.assert_allclose(parts, values["speed/step_ms"], rtol=1e-6)
    np.testing.assert_allclose(values["speed/step_ms"], 1e3 * seconds)
    meter.add(metrics(5.0))
    assert meter.collect()[0]["train/loss"] == 5


def test_what_is_not_finite_stops_the_run_soon_and_names_its_records(tmp_path):
    meter = make_meter(tmp_path, "stop", size=9)
    meter.add(metrics())
    meter.add(metrics(float("nan")))
    message = (
        r"loss is nan at step 12; its records: step12row0, .*step12row7 and 1 more, all in .*json"
    )
    with pytest.raises(monitor.NonFiniteError, match=message):
        for _ in range(monitor.AHEAD):
            meter.add(metrics())
    line = json.loads((tmp_path / "nonfinite.jsonl").read_text())
    assert line["step"] == 12 and len(line["ids"]) == 9


def test_skipped_steps_are_counted_and_three_in_a_row_stop_the_run(tmp_path):
    meter = make_meter(tmp_path, "skip")
    bad = metrics(1.0, float("inf"))
    for one in (bad, bad, metrics(), bad, metrics()):
        meter.add(one)
    assert meter.collect()[0]["train/skipped_steps"] == 3
    meter.add(bad)
    meter.add(bad)
    meter.add(bad)
    with pytest.raises(
        monitor.NonFiniteError, match="3 steps in a row were skipped: grad_norm is inf at"
    ):
        meter.collect()
    assert len((tmp_path / "nonfinite.jsonl").read_text().splitlines()) == 6


def test_speed(monkeypatch):
    found = monitor.speed(0.5, 100, 1e12)
    assert found["speed/samples_per_s"] == 200
    assert found["speed/tflops_per_device"] == 200 / len(jax.devices())
    assert "speed/mfu" not in found  # of a CPU

    class H100:
        device_kind = "NVIDIA H100 80GB HBM3"

    monkeypatch.setattr(jax, "devices", lambda: [H100()] * 2)
    found = monitor.speed(0.5, 100, 1e12)
    np.testing.assert_allclose(found["speed/mfu"], 100 / 989)
    assert monitor.memory()["memory/host_peak_gib"] > 0.1


def test_model_flops():
    """262 GFLOP a sample is the reference's arrangement of VCM; a teacher is counted by XLA."""

    class Compiled:
        def cost_analysis(self):
            return {"flops": 5e9}

    model = MODELS["small_16k"]
    batch = abstract_batch(model, 16)
    found, how = monitor.model_flops(model, StepConfig(steps=1), Compiled(), batch)
    assert how == "counted by hand" and round(found / 1e9) == 262
    other = StepConfig(steps=1, objective=ReflowConfig(teacher="run"))
    found, how = monitor.model_flops(model, other, Compiled(), batch, devices=8)
    assert how == "XLA's count" and found == 5e9 * 8 / 16


@pytest.mark.parametrize("text", ["3", "3:", ":3", "5:3", "3:3", "0:2", "a:b", "-1:2"])
def test_profiles_that_are_no_span(text):
    with pytest.raises(ValueError, match="profile .* must be START:STOP"):
        monitor.parse_profile(text)
    assert monitor.parse_profile("10:13") == (10, 13) and monitor.parse_profile("") is None


def test_a_spectrogram_shows_a_tone_where_it_is():
    rate = 16_000
    seconds = np.arange(rate) / rate
    sound = np.where(seconds < 0.5, np.sin(2 * np.pi * 2000 * seconds), 0)
    image = spectrogram(sound, rate)
    height, width = image.shape
    assert (height, width) == (257, 126) and image.dtype == np.uint8
    row = image[:, 30].argmax()
    assert abs((height - 1 - row) * rate / 512 - 2000) < 40  # low frequencies are below
    assert image[row, 30] > 240 and image[:, 100].max() == 0
    assert spectrogram(np.zeros(rate), rate).max() == 0


def test_a_resumed_run_drops_the_lines_after_the_step_it_resumes_from(tmp_path):
    for first_step, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        writer = Writer(tmp_path, first_step)
        for step in steps:
            writer.scalars(step, {"a": 10 * first_step + step, "b": float("nan")})
        writer.close()
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 3, "a')  # killed in the middle of a line
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines[:-1]] == [1, 2, 3, 4]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("a")
    assert [(e.step, e.value) for e in events] == [(1, 1), (2, 2), (3, 23), (4, 24)]
    assert not Writer(tmp_path, enabled=False).enabled

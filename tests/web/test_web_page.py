"""The page: takes, comparisons, what it says, and what its server gives out and refuses."""

import dataclasses
import json
import re
import threading
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import requests
import soundfile

from vcm_jax.generation import clips
from vcm_jax.generation.clips import Request, encode_request, generate, generate_latents
from vcm_jax.media.sound import read_audio
from vcm_jax.objectives.flow_matching import FlowMatchingConfig
from vcm_jax.objectives.vcm import VCMConfig
from vcm_jax.sampling import Sampler, uniform_times
from vcm_jax.web import making
from vcm_jax.web.asked import Limits, check
from vcm_jax.web.jobs import Desk, Stage
from vcm_jax.web.making import Take, Variant, make
from vcm_jax.web.models import capabilities, resident, sampler

LIMITS = Limits(megabytes=1, seconds=3)  # as those of the fixture `site`
VISITOR = types.SimpleNamespace(session_hash="visitor")


@pytest.mark.parametrize(
    "way, negative",
    [(Sampler(), ""), (Sampler(3.0, (0.2, 0.9), restart=True), "rain")],
    ids=["own", "guided and restarted"],
)
def test_steps_that_can_be_stopped_give_the_same_samples(model, video, way, negative):
    run = dataclasses.replace(model.run, sampler=way)
    item = encode_request(Request("clip", video, "a ball", negative_prompt=negative), run)
    steps, times = [], uniform_times(3)
    whole = generate_latents(run, [item], times, 5, 1)[0]
    stepwise = generate_latents(run, [item], times, 5, 1, lambda *step: steps.append(step))[0]
    np.testing.assert_allclose(stepwise, whole, atol=1e-5 * whole.std())
    assert steps == [(0, 3), (1, 3), (2, 3)]


def test_sampling_ends_at_the_step_at_which_it_is_stopped(model, monkeypatch):
    evaluated = []
    count = lambda *arguments: evaluated.append(1) or velocity(*arguments)
    velocity = clips._velocity
    monkeypatch.setattr(clips, "_velocity", count)
    item = encode_request(Request("clip", None, "a ball"), model.run)

    def stop(done, steps):
        if done == 2:
            raise KeyError("stopped")

    with pytest.raises(KeyError, match="stopped"):
        generate_latents(model.run, [item], uniform_times(25), 0, 1, stop)
    assert len(evaluated) == 2


def work(model, asked, folder, steps=1, **changes):
    """(stages, takes) of one variant."""
    variant = dataclasses.replace(Variant("Result", model, steps, 0, 0), **changes)
    said = list(Desk().open("a").follow(lambda job: make(asked, [variant], folder, job)))
    stages = [each for each in said if isinstance(each, Stage)]
    assert [stage.done for stage in stages] == sorted(stage.done for stage in stages)
    return [stage.text for stage in stages], [each for each in said if isinstance(each, Take)]


def test_the_sound_is_that_of_generate(model, video, tmp_path):
    asked = check(LIMITS, video, prompt="a ball")
    stages, (take,) = work(model, asked, tmp_path, steps=2)
    assert stages == ["Reading the video", "Seeing", "Sampling, step 1 of 2",
                      "Sampling, step 2 of 2", "Sounding", "Writing"]  # fmt: skip
    item = encode_request(Request(video.stem, video, "a ball"), model.run)
    ((_, sound),) = generate(model.run, [item], uniform_times(2))
    np.testing.assert_allclose(take.sound, sound, atol=1e-4)
    rate = model.run.codec.sample_rate
    assert soundfile.info(take.wav).frames == len(sound) == round(1.28 * rate)
    muxed = read_audio(take.movie, rate)
    assert np.sqrt(np.mean(muxed**2)) > 1e-3 and take.change.max() > 0


def test_a_span_of_a_video_a_picture_and_a_prompt(model, video, tmp_path):
    rate = model.run.codec.sample_rate
    stages, (take,) = work(model, check(LIMITS, video, start=0.3, seconds=0.8), tmp_path)
    assert len(take.sound) == 0.8 * rate and len(take.change) == 19
    image = tmp_path / "picture.png"
    from PIL import Image

    Image.fromarray(np.full((33, 41, 3), 90, np.uint8)).save(image)
    stages, (take,) = work(model, check(LIMITS, image=image, seconds=1), tmp_path)
    assert stages[0] == "Seeing" and take.change is None
    assert len(read_audio(take.movie, rate)) == rate
    stages, (take,) = work(model, check(LIMITS, prompt="a ball"), tmp_path)
    assert stages[0] == "Reading the prompt" and take.movie is None
    assert len(take.sound) == round(1.28 * rate)


def test_what_is_loaded_in_turn_can_be_kept(model, tmp_path):
    """Public weights are loaded for each job, or once."""
    whole, loads = model.run, []
    names = ("encoders", "variables", "codec")
    loaders = {n: lambda n=n: loads.append(n) or getattr(whole, n) for n in names}
    lazy = dataclasses.replace(whole, variables=None, encoders=None, loaders=loaders)
    asked = check(LIMITS, prompt="a ball")
    _, (take,) = work(dataclasses.replace(model, run=lazy), asked, tmp_path)
    assert loads == list(names)
    kept = dataclasses.replace(model, run=resident(lazy))
    _, (other,) = work(kept, asked, tmp_path)
    assert loads == list(names) * 2 and (take.sound == other.sound).all()


def test_what_a_model_can_do_follows_from_its_objective(model):
    own = capabilities(model.run)
    assert own.steps == 1 and own.guidance.default == 0
    assert sampler(model.run, 0) == Sampler() and sampler(model.run, 3) == Sampler(3.0)
    flow = dataclasses.replace(model.run, objective=FlowMatchingConfig(), steps=25)
    assert capabilities(flow).steps == 25 and capabilities(flow).guidance.default == 4.5
    assert sampler(flow, 4.5) == Sampler() and sampler(flow, 2) == Sampler(2.0)
    chosen = dataclasses.replace(model.run, objective=VCMConfig(guidance="conditioned"))
    assert (capabilities(chosen).guidance.default, capabilities(chosen).guidance.highest) == (4, 8)
    assert not capabilities(chosen).negative_prompt and sampler(chosen, 3) == Sampler(3.0)
    once = Variant("A", dataclasses.replace(model, run=chosen), 1, 3, 7).facts
    assert once == "run · 1 step · 1 evaluation · guidance 3 · seed 7"
    with pytest.raises(ValueError, match="guidance must be from 1 to 10"):
        sampler(model.run, 11)
    with pytest.raises(ValueError, match="a negative prompt needs guidance"):
        work(model, check(LIMITS, prompt="x", negative_prompt="y"), Path("unused"))
    facts = Variant("A", dataclasses.replace(model, run=flow), 4, 0, 7).facts
    assert facts == "run · 4 steps · 8 evaluations · seed 7"


ASKED = {
    "video": None, "image": None, "prompt": "a ball", "negative": "", "mode": "Takes", "steps": 1,
    "other_steps": 4, "guidance": 0, "seed": 0, "takes": 1, "start": 0, "seconds": 0,
    "blind": True,
}  # fmt: skip


def visit(page, **changes):
    """What the page shows: all that it yields."""
    return list(page.on_generate(**ASKED | changes, request=VISITOR))


def shown(update) -> str:
    return update.get("value") or ""


def test_takes_stand_side_by_side(site, video):
    page, _ = site
    *_, (status, first, second, third, *_) = visit(page, video=str(video), takes=2)
    assert "2 takes" in status and not third["visible"]
    for seed, slot in enumerate((first, second)):
        text = shown(slot)
        assert f"Take {seed + 1}" in text and f"seed {seed}" in text
        for drawing in ("motion in the picture", "waveform", "mel spectrogram"):
            assert f'alt="{drawing}' in text
        assert ".mp4" in text and ".wav" in text
    assert shown(first) != shown(second)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prompt": ""}, "drop a video or a picture"),
        ({"takes": 9}, "takes: 9; from 1 to 4"),
        ({"steps": 0}, "steps: 0; from 1 to 100"),
        ({"steps": "<b>"}, "steps and guidance are numbers"),
        ({"mode": "Two numbers of steps", "other_steps": 1}, "choose different ones"),
        ({"negative": "rain"}, "a negative prompt needs guidance"),
        ({"seconds": 0.01}, "a ball: "),
    ],
)
def test_a_job_that_fails_shows_its_line_and_the_next_one_works(site, changes, message):
    page, _ = site
    *_, (status, *_) = visit(page, **changes)
    assert message in status and 'role="alert"' in status
    *_, (status, first, *_) = visit(page)
    assert "Done" in status and "<audio" in shown(first)


def test_a_bug_is_one_line_too(site, monkeypatch):
    page, _ = site
    monkeypatch.setattr(making, "decode", lambda *_: 1 / 0)
    *_, (status, *_) = visit(page)
    assert "ZeroDivisionError: division by zero" in status and "Traceback" not in status


@pytest.mark.parametrize(
    "mode, facts", [("Two numbers of steps", "4 steps"), ("Two runs", "another")]
)
def test_a_blind_comparison_stays_blind_until_the_vote(site, mode, facts):
    page, _ = site
    everything = visit(page, mode=mode)
    *_, (_, first, second, _, _, vote, comparison) = everything
    assert vote["visible"] and "<h3>A</h3>" in shown(first) and "<h3>B</h3>" in shown(second)
    visible = str([each[:-1] for each in everything])
    for hint in ("step", "evaluation", "another", "Download", "seed"):
        assert hint not in visible.replace("Listen", ""), hint
    status, first, second, vote, _ = page.on_vote("b", comparison)
    assert "Noted: B is better" in status and facts in shown(first) + shown(second)
    row = page.votes.path.read_text().splitlines()[-1].split("\t")
    assert row[1:3] == ["a ball", "a ball"] and row[5:] == ["yes", "b"]
    assert row[3] in shown(first).replace("&middot;", "·") and row[3] != row[4]


def test_blind_comparisons_are_in_random_order(site):
    page, _ = site
    orders = set()
    for _ in range(20):
        *_, comparison = visit(page, mode="Two numbers of steps")[-1]
        orders.add(tuple(take.variant.steps for take in comparison.takes))
        if len(orders) == 2:
            break
    assert orders == {(1, 4), (4, 1)}


def test_a_cancelled_job_stops_within_a_step(site, monkeypatch):
    page, _ = site
    evaluated, velocity = [], clips._velocity

    def slow(*arguments):
        evaluated.append(1)
        time.sleep(0.05)
        return velocity(*arguments)

    monkeypatch.setattr(clips, "_velocity", slow)
    heard = page.on_generate(**ASKED | {"steps": 25}, request=VISITOR)
    while "step 3 of 25" not in next(heard)[0]:
        pass
    page.on_cancel(VISITOR)
    count = len(evaluated)
    *_, (status, *_) = heard
    assert "Cancelled." in status and len(evaluated) <= count + 1 < 25


def test_text_of_visitors_is_escaped(site):
    page, _ = site
    name = "<img src=x onerror=alert(1)>"
    *_, (status, *_) = visit(page, prompt=name, seconds=0.01)
    assert "<img" not in status and "&lt;img" in status


# The server


def call(address, *data):
    """The events of a call of the API by plain HTTP, as (event, data)."""
    url = f"{address}gradio_api/call/generate"
    answer = requests.post(url, json={"data": list(data)}, timeout=60)
    answer.raise_for_status()
    text = requests.get(f"{url}/{answer.json()['event_id']}", timeout=60).text
    return [(e, json.loads(d)) for e, d in re.findall(r"event: (\w+)\ndata: (.*)\n", text)]


def data(**changes):
    given = ASKED | changes
    names = "video image prompt negative steps guidance seed takes start seconds".split()
    return [given[name] for name in names]


def upload(address, name, content):
    files = {"files": (name, content)}
    return requests.post(f"{address}gradio_api/upload", files=files, timeout=60)


def test_the_api_gives_files(site, video):
    _, address = site
    (path,) = upload(address, "clip.mp4", video.read_bytes()).json()
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    *stages, (event, (text, files)) = call(address, *data(video=file, takes=2))
    assert event == "complete" and text == "done" and len(files) == 4
    assert ["Seeing", None] in [list(value) for _, value in stages]
    got = requests.get(files[0]["url"], timeout=60)
    assert got.content[4:8] == b"ftyp"
    part = requests.get(files[0]["url"], headers={"Range": "bytes=4-7"}, timeout=60)
    assert part.status_code == 206 and part.content.startswith(b"ftyp")


def test_files_of_the_server_are_out_of_reach(site, world, video):
    page, address = site
    places = ["/etc/passwd", world / "run/run.json", video, page.votes.path, Path(__file__),
              "setup.py", f"{page.files.root}/../", f"{page.files.root}/results"]  # fmt: skip
    for place in places:
        for prefix in ("gradio_api/file=", "file=", "gradio_api/file/", "static/", "assets/"):
            answer = requests.get(f"{address}{prefix}{place}", timeout=60)
            assert answer.status_code in (403, 404), (prefix, place)
    for place in ("/etc/passwd", str(video)):
        file = {"path": place, "meta": {"_type": "gradio.FileData"}}
        for name in ("video", "image"):
            event, what = call(address, *data(**{name: file}))[-1]
            assert event == "error" and "not uploaded by a user" in what["error"]


@pytest.mark.parametrize(
    "path",
    ["proxy=http://127.0.0.1/", "file=http://127.0.0.1/", "vibe-edit", "process_recording",
     "run-history/buckets", "deep_link?session_hash=x"],
)  # fmt: skip
def test_what_the_page_does_not_need_is_not_there(site, path):
    _, address = site
    for verb in ("get", "post"):
        assert requests.request(verb, f"{address}gradio_api/{path}", timeout=60).status_code == 404
    assert requests.get(f"{address}monitoring", timeout=60).status_code == 404


def test_addresses_are_not_fetched(site):
    _, address = site
    file = {"path": f"{address}config", "meta": {"_type": "gradio.FileData"}}
    event, what = call(address, *data(video=file))[-1]
    assert event == "error" and "upload the file itself" in str(what)


def test_the_browser_is_told_to_load_nothing_from_elsewhere(site):
    _, address = site
    answer = requests.get(address, timeout=60)
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert not re.findall(r'(?:src|href)="https?://(?!127\.0\.0\.1)[^"]*"', answer.text)
    config = requests.get(f"{address}config", timeout=60).json()
    assert config["analytics_enabled"] is False and address.startswith("http://127.0.0.1:")


def test_examples_are_copies_among_the_temporary_files(site, video):
    """Gradio gives out no others."""
    page, _ = site
    ((path, prompt),) = page.examples
    assert path.parent.parent == page.files.root and path.read_bytes() == video.read_bytes()
    assert prompt == "a ball"


def test_large_uploads_are_refused_and_bad_files_are_one_line(site):
    _, address = site
    assert upload(address, "large.mp4", bytes(1_100_000)).status_code == 413
    (path,) = upload(address, "text.mp4", b"no video").json()
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    event, what = call(address, *data(video=file))[-1]
    assert event == "error" and "text.mp4: this is no video that can be read" in str(what)
    assert call(address, *data())[-1][0] == "complete"


def test_two_visitors_at_once_wait_for_each_other(site, monkeypatch):
    _, address = site
    at_work, most = [], []

    def counted(*arguments):
        at_work.append(1)
        most.append(len(at_work))
        time.sleep(0.1)
        at_work.pop()
        return latents(*arguments)

    latents = making.generate_latents
    monkeypatch.setattr(making, "generate_latents", counted)
    ends = []
    visit = lambda: ends.append(call(address, *data())[-1][0])
    threads = [threading.Thread(target=visit) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert ends == ["complete"] * 3 and most == [1] * 3


def test_with_a_password_nothing_is_given_out_without_it(site):
    page, _ = site
    from vcm_jax.web.serve import start

    blocks, address = start(page, "127.0.0.1", None, ("me", "secret"))
    try:
        clip = f"gradio_api/file={page.examples[0][0]}"
        session = requests.Session()
        for expected in (401, 200):
            for path in ("config", "gradio_api/info", clip):
                assert session.get(f"{address}{path}", timeout=60).status_code == expected, path
            url = f"{address}gradio_api/upload"
            sent = session.post(url, files={"files": ("a.mp4", b"x")}, timeout=60)
            assert sent.status_code == expected
            wrong = {"username": "me", "password": "wrong"}
            assert requests.post(f"{address}login", data=wrong, timeout=60).status_code == 400
            session.post(f"{address}login", data=wrong | {"password": "secret"}, timeout=60)
    finally:
        blocks.close(verbose=False)


def test_the_example_of_the_documentation(site, video, capsys):
    pytest.importorskip("gradio_client", reason="needs gradio_client, the extra `web`")
    _, address = site
    text = (Path(__file__).parents[2] / "docs/web.md").read_text()
    (code,) = [c for c in re.findall(r"```python\n(.*?)```", text, re.S) if "gradio_client" in c]
    code = code.replace("http://127.0.0.1:7860", address).replace("silent.mp4", str(video))
    exec(code, {})
    *_, wav = capsys.readouterr().out.split()
    assert soundfile.info(wav).frames == round(1.28 * 16_000)


def test_the_device_is_free_in_the_end(site):
    page, _ = site
    assert page.desk._device.acquire(timeout=10)
    page.desk._device.release()
    assert jax.devices()

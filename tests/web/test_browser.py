"""The page in a real browser: headless Chromium."""

import io
import re
import shutil
import time

import av
import numpy as np
import pytest
import requests

from vcm_jax.generation import clips

pytestmark = pytest.mark.slow
WAIT = 120_000  # ms; the machine may be busy


@pytest.fixture(scope="module")
def chromium():
    """Chromium of the system or, without one, playwright's own."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright, an extra")
    with api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(
                executable_path=shutil.which("chromium"),
                args=["--no-sandbox", "--autoplay-policy=no-user-gesture-required"],
            )
        except api.Error as error:
            pytest.skip(f"needs Chromium: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, site):
    """A function that opens the page as a new visitor."""
    contexts = []

    def new(width=1300, height=900):
        contexts.append(chromium.new_context(viewport={"width": width, "height": height}))
        page = contexts[-1].new_page()
        page.set_default_timeout(WAIT)
        page.asked = []
        page.on("request", lambda request: page.asked.append(request.url))
        page.errors = []
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.goto(site[1])
        page.wait_for_selector("#go")
        return page

    yield new
    for context in contexts:
        context.close()


def drop(page, path):
    """Uploads a video and waits until it is there."""
    page.set_input_files("#video input[type=file]", path)
    page.wait_for_selector("#video video")


def says(page, text):
    """Waits until the status says so."""
    page.wait_for_function(
        "text => document.querySelector('#status').innerText.includes(text)", arg=text
    )


@pytest.fixture
def slow(monkeypatch):
    """Steps that take a tenth of a second."""
    velocity = clips._velocity

    def wait(*arguments):
        time.sleep(0.1)
        return velocity(*arguments)

    monkeypatch.setattr(clips, "_velocity", wait)


def loudness(address) -> float:
    """Root mean square of a file's sound."""
    with av.open(io.BytesIO(requests.get(address, timeout=60).content)) as container:
        frames = [frame.to_ndarray() for frame in container.decode(audio=0)]
    return float(np.sqrt(np.mean(np.concatenate(frames, 1) ** 2)))


PLAY = """async () => {
  const video = document.querySelector('.take video');
  await video.play();
  await new Promise(resolve => setTimeout(resolve, 700));
  return [video.src, video.duration, video.webkitAudioDecodedByteCount];
}"""
WIDTHS = "[document.documentElement.scrollWidth, window.innerWidth]"


@pytest.mark.parametrize("width", [1300, 390])
def test_a_dropped_video_gets_a_sound_that_can_be_heard(visit, site, video, tmp_path, width):
    page = visit(width)
    drop(page, video)
    page.fill("#prompt textarea, #prompt input", "a ball")
    page.click("#go")
    page.wait_for_selector(".take video")
    says(page, "Done")
    source, seconds, decoded = page.evaluate(PLAY)
    assert abs(seconds - 1.28) < 0.1 and decoded > 0
    assert loudness(source) > 1e-3
    assert page.evaluate("document.querySelector('.playhead').style.left") != ""
    scrolled, inner = page.evaluate(WIDTHS)
    assert scrolled <= inner == width
    page.screenshot(path=tmp_path / f"{width}.png", full_page=True)
    elsewhere = [a for a in page.asked if not a.startswith((site[1], "data:", "blob:"))]
    assert not elsewhere and not page.errors


def test_a_bad_file_and_a_large_one_are_a_line_and_the_next_one_works(visit, video, tmp_path):
    page, bad, large = visit(), tmp_path / "bad.mp4", tmp_path / "large.mp4"
    bad.write_text("no video")
    large.write_bytes(bytes(1_100_000))
    page.set_input_files("#video input[type=file]", large)
    page.wait_for_selector("text=maximum allowed size")
    page.set_input_files("#video input[type=file]", bad)
    page.wait_for_selector("#video video")
    page.click("#go")
    says(page, "bad.mp4: this is no video that can be read")
    page.click("#video button[aria-label=Clear], #video button[title=Clear]")
    drop(page, video)
    page.click("#go")
    says(page, "Done")


def test_two_visitors_at_once(visit, slow):
    pages = [visit(), visit()]
    for page in pages:
        page.fill("#prompt textarea, #prompt input", "a ball")
        page.click("#steps label:has-text('25')")
        page.click("#go")
    pages[1].wait_for_function(
        "() => /queue: *1 *\\/ *1/.test(document.querySelector('#status').innerText)"
    )
    says(pages[0], "step 5 of 25")
    for page in pages:
        says(page, "Done")
        assert page.locator(".take audio").count() == 1


def test_a_cancelled_job_ends_and_the_next_one_works(visit, site, slow):
    page = visit()
    page.fill("#prompt textarea, #prompt input", "a ball")
    page.click("#steps label:has-text('25')")
    page.click("#go")
    says(page, "step 2 of 25")
    page.click("#cancel")
    says(page, "Cancelled.")
    assert site[0].desk._device.acquire(timeout=1)  # the job has ended
    site[0].desk._device.release()
    page.click("#steps label:has-text('4')")
    page.click("#go")
    says(page, "Done")


def test_a_blind_comparison(visit, site):
    page = visit()
    page.fill("#prompt textarea, #prompt input", "a ball")
    page.click("text=Compare (A/B)")
    page.click("text=Two numbers of steps")
    page.click("#go")
    page.click("#vote-a")
    says(page, "Noted: A is better.")
    assert re.search(r"A: run · (1|25) step", page.inner_text("#status"))
    assert site[0].votes.path.read_text().splitlines()[-1].endswith("\tyes\ta")


def test_an_example_fills_in_its_prompt(visit):
    page = visit()
    page.click("#examples button >> nth=0")
    page.wait_for_selector("#video video")
    assert page.input_value("#prompt textarea, #prompt input") == "a ball"

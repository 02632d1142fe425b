"""A small run, and the page that serves it."""

import dataclasses

import pytest
from small_runs import make_world

from vcm_jax.web.asked import Limits
from vcm_jax.web.files import Files
from vcm_jax.web.models import open_model
from vcm_jax.web.votes import Votes

LIMITS = Limits(megabytes=1, seconds=3)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), 8)


@pytest.fixture(scope="module")
def model(world):
    return open_model(world / "run")


@pytest.fixture(scope="module")
def video(world):
    return world / "data/test/000001.mp4"


@pytest.fixture(scope="module")
def site(world, model, video, tmp_path_factory):
    """The page of two models, and the address where it is served."""
    pytest.importorskip("gradio", reason="needs gradio, the extra `web`")
    from vcm_jax.web.serve import prepare, start

    files = Files()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GRADIO_TEMP_DIR", "GRADIO_EXAMPLES_CACHE", "GRADIO_ANALYTICS_ENABLED",
                     "HF_HUB_DISABLE_TELEMETRY"):  # fmt: skip
            patch.setenv(name, "")
        prepare(files)
        from vcm_jax.web.page import Page

        votes = Votes(tmp_path_factory.mktemp("votes") / "votes.tsv")
        models = [model, dataclasses.replace(model, name="another")]
        page = Page(models, LIMITS, files, votes, [(video, "a ball")])
        blocks, address = start(page, "127.0.0.1", None, None)
        yield page, address
        blocks.close(verbose=False)
        files.close()

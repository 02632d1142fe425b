"""The notebook of the documentation runs as it is, in an empty folder."""

from pathlib import Path

import numpy as np
import pytest

from vcm_jax.media.sound import read_audio

NOTEBOOK = Path(__file__).parents[2] / "docs/tutorial.ipynb"


def read():
    nbformat = pytest.importorskip("nbformat", reason="needs nbformat, an extra")
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_stored_without_outputs():
    for cell in read().cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None, cell.source


@pytest.mark.slow
def test_every_cell_runs(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient, an extra")
    pytest.importorskip("ipykernel", reason="needs ipykernel, an extra")
    notebook = read()
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]))
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=1800, resources=resources).execute()
    sound = read_audio(tmp_path / "tutorial/out.mp4", 16_000)
    assert len(sound) == round(2.56 * 16_000) and np.sqrt(np.mean(sound**2)) > 1e-3
    scores = notebook.cells[-2].outputs[0].data["text/plain"]
    assert "log_mel_fd" in scores
    pictures = [
        output.data for cell in notebook.cells for output in cell.get("outputs", ())
        if output.output_type in ("display_data", "execute_result")
    ]  # fmt: skip
    assert any("image/png" in data for data in pictures)
    assert any("<audio" in data.get("text/html", "") for data in pictures)

"""run.json: it comes back as it was written, and whatever is wrong with it is one line."""

import json

import pytest
from small_runs import make_config, write_records

from vcm_jax.records.source import RecordSource
from vcm_jax.runs import description
from vcm_jax.training import setup


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_records(folder / "records", 2)
    source = RecordSource(folder / "records")
    config = make_config(folder)
    model = setup.model_config(config, source.manifest)
    settings = json.loads(config.to_json_best_effort())
    description.write(folder, settings, model, source.manifest, folder / "records/codec")
    return folder, description.Description(
        settings, model, source.manifest.sequence, source.manifest.encoders, source.manifest.codec
    )


def test_it_comes_back(run):
    folder, wanted = run
    assert description.is_run(folder) and not description.is_run(folder / "codec")
    assert description.read(folder) == wanted
    assert (folder / "codec/codec.json").exists()


def edited(folder, tmp_path, edit):
    content = json.loads((folder / "run.json").read_text())
    content = edit(content)
    (tmp_path / "run.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return tmp_path


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda run: {}, "it lacks config"),
        (lambda run: [], "a JSON object is needed, not list"),
        (lambda run: "{", "not JSON"),
        (lambda run: run | {"model": 3} | {"hash": None}, "damaged"),
        (lambda run: without_hash(run) | {"model": 3}, "'model' is not a JSON object"),
        (lambda run: without_hash(run) | {"sequence": {"x": 1}}, "newer version .*'x'"),
        (
            lambda run: without_hash(run) | {"model": run["model"] | {"num_heads": 7}},
            "newer version .*hidden_dim 16 over 7 heads",
        ),
        # One digit of a number, as a damaged disk would change it.
        (lambda run: json.dumps(run).replace('"duration": 0.64', '"duration": 0.65'), "its hash"),
    ],
)
def test_damaged_and_foreign_files(run, tmp_path, edit, message):
    with pytest.raises(ValueError, match=f"run.json.*{message}") as error:
        description.read(edited(run[0], tmp_path, edit))
    assert "\n" not in str(error.value)


def without_hash(run):
    """As an older version wrote it."""
    return {key: value for key, value in run.items() if key != "hash"}


def test_files_of_older_versions_are_read(run, tmp_path):
    assert description.read(edited(run[0], tmp_path, without_hash)) == run[1]


def test_a_folder_that_is_no_run(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(ValueError, match="is not the workdir of a run: it has no run.json"):
            description.read(path)

"""Configs by path and by name, in a checkout, installed, and from any directory."""

import sys

import pytest

from vcm_jax.objectives import OBJECTIVES, make_settings
from vcm_jax.training import configs, setup


@pytest.fixture
def outside(monkeypatch, tmp_path):
    """A working directory outside the checkout, where no package `configs` can be found."""
    monkeypatch.chdir(tmp_path)
    roots = {str(path) for path in (configs.folder().parent, "")}
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in roots])
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name == "configs"}
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "configs"]:
        del sys.modules[name]
    sys.modules.update(before)


def test_names_become_paths(outside):
    path = str(configs.folder() / "s16k.py")
    for given, wanted in (
        (["--config=s16k"], [f"--config={path}"]),
        (["--config=s16k:soflow"], [f"--config={path}:soflow"]),
        (["-config", "s16k:soflow"], ["-config", f"{path}:soflow"]),
        (["--config.steps=3", "--workdir=s16k"], ["--config.steps=3", "--workdir=s16k"]),
        (["--config=configs/mine.py:x"], ["--config=configs/mine.py:x"]),
        (["--config"], ["--config"]),
    ):
        assert configs.resolve(given) == wanted
    (outside / "s16k").write_text("")
    assert configs.resolve(["--config=s16k"]) == ["--config=s16k"]  # what is there comes first
    with pytest.raises(configs.ConfigError, match="--config=s17k: no such config; there are abl"):
        configs.resolve(["--config=s17k"])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_demo_trains_all_objectives_alike(name):
    """Without guidance in the target, at the same times where the papers have the same."""
    from configs import impacts

    settings = setup.step_config(impacts.get_config(name)).objective
    if settings.instant_only:
        assert settings.guidance_scale <= 3  # of sampling
        return
    assert settings.guidance_scale == 1 and not settings.guides
    if make_settings(name).time_mean == -0.4:
        assert (settings.time_mean, settings.time_std) == (0.0, 1.2)


def test_installed_configs_come_from_the_package(monkeypatch, tmp_path):
    (tmp_path / "s16k.py").write_text("")
    monkeypatch.setattr(configs, "_FOLDERS", (tmp_path, configs.folder()))
    assert configs.resolve(["--config=s16k"]) == [f"--config={tmp_path / 's16k.py'}"]


def test_configs_import_those_beside_them_and_ours(outside):
    mine = outside / "my configs"
    mine.mkdir()
    (mine / "base.py").write_text("steps = 7\n")
    configs.resolve([f"--config={mine / 'run.py'}"])
    scope = {}
    exec("from configs import base, s16k", scope)
    assert scope["base"].steps == 7
    assert scope["s16k"].get_config("soflow").objective.name == "soflow"

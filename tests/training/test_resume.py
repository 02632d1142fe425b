"""Which settings may change when a run is resumed."""

import pytest
from small_runs import load_config

from vcm_jax.training import resume

META = {
    "config": {
        "seed": 0,
        "steps": 10,
        "batch_size": 8,
        "log_every": 2,
        "mesh": {"data": 1},
        "data": {"dir": "a", "sources": ["train=1"]},
        "objective": {"p": 1.0},
        "optimizer": {"eps": 1e-6},
        "model": "demo",
    },
    "records": {"codec": {"fingerprint": "c"}},
    "sources": {"train=1": {"records": 12, "fingerprint": "0123456789"}},
}


def changed(section, **values):
    return META | {section: META[section] | values}


def test_nothing_changed():
    assert resume.check(META, META, allow=False) == []


def test_how_the_work_is_done_may_change():
    now = changed(
        "config", mesh={"data": 8}, log_every=3, data=META["config"]["data"] | {"dir": "b"}
    )
    assert resume.check(META, now, allow=False) == [
        "config.data.dir is 'b', was 'a'",
        "config.log_every is 3, was 2",
        "config.mesh.data is 8, was 1",
    ]


def test_more_steps_need_no_permission():
    assert resume.check(META, changed("config", steps=20), allow=False) == [
        "config.steps is 20, was 10"
    ]
    both = changed("config", steps=20, optimizer={"eps": 1})
    with pytest.raises(
        resume.ResumeError, match="started with other settings: config.opt.*1e-06. "
    ):
        resume.check(META, both, allow=False)


def test_every_setting_of_the_logs_is_free():
    """Whatever says how often, or on how many clips, a run is watched."""
    watching = [key for key in load_config("s16k") if key.endswith("_every")]
    watching += ["eval_batches", "eval_clips", "eval_sample_steps", "sample_clips", "profile"]
    assert len(watching) >= 11 and set(watching) <= set(resume.FREE)


@pytest.mark.parametrize(
    "now, message",
    [
        (changed("config", steps=5), "config.steps is 5, was 10"),
        (changed("config", optimizer={"eps": 1}), "config.optimizer.eps is 1, was 1e-06"),
        (
            changed("sources", **{"train=1": {"records": 13, "fingerprint": "abcdefghij"}}),
            r"data source train=1 changed since the checkpoint: 13 records \(abcdefgh\), "
            r"was 12 \(01234567\)",
        ),
    ],
)
def test_what_is_allowed_when_asked_for(now, message):
    with pytest.raises(resume.ResumeError, match=f"{message}.*allow_config_change"):
        resume.check(META, now, allow=False)
    (line,) = resume.check(META, now, allow=True)
    assert "was" in line


@pytest.mark.parametrize(
    "now, message",
    [
        (changed("config", batch_size=16), "config.batch_size is 16, was 8"),
        (changed("config", objective={"p": 2.0}), "config.objective.p is 2.0, was 1.0"),
        (changed("config", model="large"), "config.model is 'large', was 'demo'"),
        (changed("records", codec={"fingerprint": "d"}), "records' codec.fingerprint is 'd', was"),
    ],
)
def test_another_run_is_refused_in_any_case(now, message):
    for allow in (False, True):
        with pytest.raises(resume.ResumeError, match=f"another run: {message}.*--workdir"):
            resume.check(META, now, allow)


def test_every_key_of_the_configs_has_a_group_that_exists():
    """A key in FREE or FIXED that no config has is a typing error."""
    config = load_config("s16k").to_dict()
    for key in (*resume.FREE, *resume.FIXED):
        head, _, tail = key.partition(".")
        assert head == "records" or head in config and (not tail or tail in config[head]), key

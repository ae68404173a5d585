"""What the launchers would run: commands, sweeps, hostfiles and manifests, built in this process."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

from launch import cli
from launch.clusters.agent import Agents, agent_command, agent_environment
from launch.clusters.deepspeed import Host, read_hostfile
from launch.clusters.kubernetes import parse_toleration
from launch.clusters.run_agent import status_of
from launch.clusters.work import read_work, sweep_tasks
from launch.recipe import load_recipe, resolve

BASE = str(Path(__file__).with_name("base.toml"))
TWO_NODES = ("--nodes", "2")


def launched(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["launch", *arguments]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = cli.main(["launch", *arguments])
    return status, capsys.readouterr().err


def commands(text: str) -> list[str]:
    return [line for line in text.splitlines() if not line.startswith("#")]


def test_the_agent_of_a_c10d_job_gives_every_start_a_store_of_its_own() -> None:
    agents = Agents(nodes=2, ranks_per_node=4, master="h", job="seven", grace_s=90.5)
    environment = agent_environment(agents)
    assert environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "96"
    assert environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    line = agent_command(agents, ["train", "q"], local_address="10.0.0.2", hosts_store="0", python="py")
    assert line == [
        *["py", "-m", "launch.clusters.run_agent", "--nnodes=2", "--nproc-per-node=4", "--max-restarts=0"],
        *["--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "--rdzv-backend=c10d"],
        *["--rdzv-endpoint=h:29500", "--rdzv-id=seven", "--rdzv-conf=is_host=0", "--local-addr=10.0.0.2"],
        *["-m", "launch.cli", "train", "q"],
    ]


def test_the_agent_of_a_static_job_needs_its_place() -> None:
    agents = Agents(nodes=2, ranks_per_node=1, master="h", rendezvous="static")
    with pytest.raises(ValueError, match="needs --node-rank"):
        agent_command(agents, [])
    assert "--node-rank=1" in agent_command(agents, [], node_rank=1)
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE" not in agent_environment(agents)
    for change, words in (
        ({"port": 70000}, "use 1 to 65535"),
        ({"ranks_per_node": 0}, "use 1 or more"),
        ({"nodes": 2, "rendezvous": "static", "max_restarts": 1}, "use --rendezvous c10d, or no restarts"),
    ):
        with pytest.raises(ValueError, match=words):
            Agents(**{"nodes": 1, "ranks_per_node": 1, "master": "h", **change})


def test_a_run_is_started_again_after_an_end_that_was_asked_for_and_after_no_other() -> None:
    assert [status_of(ends) for ends in ([], [0, 0], [75, 0], [-15, 75], [75, 1], [-9])] == [
        0,
        0,
        75,
        75,
        1,
        1,
    ]


def test_every_node_compares_itself_before_its_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    given = (*TWO_NODES, "--master", "h", "--ranks-per-node", "1", "--dry-run")
    run = ("--", "--set", "optimizer.lr=1e-3", "--run-dir", "my run", "--corpus", __file__)
    first, second = commands(launched(capsys, "torchrun", BASE, *given, *run))
    assert first == second
    words = shlex.split(first)
    preflight = words[words.index("preflight") : words.index("--then")]
    assert {"--set=optimizer.lr=1e-3", "--run-dir=my run", "--rdzv=h:29500", f"--corpus={__file__}"} <= set(
        preflight
    )
    assert words[-9:] == ["launch.cli", "train", BASE, *run[1:]]
    (line, _) = commands(launched(capsys, "torchrun", BASE, *given, "--no-preflight", *run))
    assert "preflight" not in line


def test_what_train_would_not_take_is_refused_before_anything_starts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ("torchrun", BASE, *TWO_NODES, "--master", "h", "--ranks-per-node", "1", "--dry-run", "--")
    for options, status, words in (
        (("--stop-at-setp", "3"), 2, "No such option: --stop-at-setp"),
        (("--set", "optimizer.lrr=1"), 1, "did you mean"),
        (("--max-restarts", "2"), 1, "give it before the `--`"),
    ):
        found, said = refused(capsys, *given, *options)
        assert (found, words in said) == (status, True), said
    status, said = refused(capsys, "slurm", BASE, "--nodes", "3", "--dry-run")
    assert status == 1
    assert "has 2 ranks, but 3 nodes x 1 are 3" in said


def test_a_sweep_is_every_combination_in_a_folder_of_its_own() -> None:
    work = read_work(BASE, ["--run-dir", "R"])
    tasks = sweep_tasks(work, ["optimizer.lr=1e-3,2e-3", 'model.pattern=["trellis"],["attention","trellis"]'])
    assert [str(task.run_dir) for task in tasks] == [
        "R-sweep/000-optimizer.lr=1e-3,model.pattern=_trellis_",
        "R-sweep/001-optimizer.lr=1e-3,model.pattern=_attention_,_trellis_",
        "R-sweep/002-optimizer.lr=2e-3,model.pattern=_trellis_",
        "R-sweep/003-optimizer.lr=2e-3,model.pattern=_attention_,_trellis_",
    ]
    last = tasks[-1].loaded
    assert (last.optimizer.lr, last.model.pattern) == (2e-3, ("attention", "trellis"))
    for sweep, words in (
        (["optimizer.lr"], "write it as"),
        (["optimizer.lr=1,,2"], "write it as"),
        (["optimizer.lr=1,1"], "twice"),
        (["optimizer.lr=1", "optimizer.lr=2"], "each key once"),
        (["optimizer.lrr=1"], "unknown key"),
    ):
        with pytest.raises(ValueError, match=words):
            sweep_tasks(work, sweep)


def test_one_run_of_an_array_is_what_the_sweep_says(capsys: pytest.CaptureFixture[str]) -> None:
    given = ("torchrun", BASE, *TWO_NODES, "--master", "h", "--ranks-per-node", "1", "--dry-run")
    sweep = ("--sweep", "optimizer.lr=1e-3,2e-3")
    line, _ = commands(launched(capsys, *given, *sweep, "--task", "1"))
    assert shlex.split(line)[-4:] == [
        *["--set", "optimizer.lr=2e-3"],
        *["--run-dir", "runs/base-sweep/001-optimizer.lr=2e-3"],
    ]
    assert refused(capsys, *given, *sweep, "--task", "2")[0] == 2


def test_a_hostfile_is_read_strictly(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# two machines\nworker-0 slots=4\n\nworker-1  slots=4 # the second\n")
    assert read_hostfile(path) == [Host("worker-0", 4), Host("worker-1", 4)]
    for text, words in (
        ("a slots=2\nb slots=4\n", "line 2: b has 4 slots and a 2: every host takes the same number"),
        ("a slots=2\na slots=2\n", "line 2: a stands there twice"),
        ("a slots=2\nb\n", "line 2: 'b': write it as `HOST slots=N`"),
        ("a slots=0\n", "N at least 1"),
        ("a slots=2 max=3\n", "write it as"),
        ("-oProxyCommand=x slots=1\n", "write it as"),
        ("# nobody\n", "names no host"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            read_hostfile(path)


def test_the_first_host_of_a_hostfile_is_where_all_meet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hosts").write_text("a slots=1\nb slots=1\n")
    given = ("deepspeed", BASE, "--hostfile", str(tmp_path / "hosts"), "--max-restarts", "2", "--dry-run")
    first, second = (
        shlex.split(shlex.split(line)[-1])[-1].split() for line in commands(launched(capsys, *given))
    )
    assert {"--rdzv-endpoint=a:29500", "--rdzv-conf=is_host=1", "--node-rank=0"} <= set(first)
    assert {"--rdzv-endpoint=a:29500", "--rdzv-conf=is_host=0", "--node-rank=1"} <= set(second)


def manifest(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    needed = (*TWO_NODES, "--image", "registry/trellis:1", "--claim", "shared")
    table: dict[str, Any] = yaml.safe_load(launched(capsys, "kubernetes", BASE, *needed, *options))
    return table


def test_the_job_set_is_one_by_the_published_schema(capsys: pytest.CaptureFixture[str]) -> None:
    table = manifest(
        capsys,
        *("--gpus-per-node", "1", "--cpus", "8", "--memory", "64Gi", "--namespace", "research"),
        *("--node-selector", "gpu=h100", "--toleration", "nvidia.com/gpu:NoSchedule"),
    )
    # Models made from the OpenAPI of Kubernetes and JobSet: a wrong type raises, an unknown key is lost.
    read = JobsetV1alpha2JobSet.from_dict(table)
    assert read is not None
    assert json.loads(json.dumps(read.to_dict())) == table
    spec = table["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (spec["parallelism"], spec["completions"], spec["completionMode"]) == (2, 2, "Indexed")
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"cpu": "8", "memory": "64Gi", "nvidia.com/gpu": "1"}
    assert pod["nodeSelector"] == {"gpu": "h100"}
    assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert pod["terminationGracePeriodSeconds"] == 30 + 30


def test_a_key_that_kubernetes_does_not_know_would_be_found(capsys: pytest.CaptureFixture[str]) -> None:
    table = manifest(capsys)
    job = table["spec"]["replicatedJobs"][0]["template"]["spec"]
    job["template"]["spec"]["terminationGrace"] = 5
    read = JobsetV1alpha2JobSet.from_dict(table)
    assert read is not None
    assert json.loads(json.dumps(read.to_dict())) != table


def test_a_preempted_pod_starts_the_job_set_again_without_counting(
    capsys: pytest.CaptureFixture[str],
) -> None:
    spec = manifest(capsys, "--max-job-restarts", "5")["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    saved, evicted = job["podFailurePolicy"]["rules"]
    assert (saved["action"], saved["onExitCodes"]["values"]) == ("FailJob", [75, 143])
    assert saved["onExitCodes"]["containerName"] == job["template"]["spec"]["containers"][0]["name"]
    assert evicted["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # which a pod failure policy needs
    assert spec["failurePolicy"]["maxRestarts"] == 5
    (rule,) = spec["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]


@pytest.mark.parametrize("place", [0, 1])
def test_a_pod_learns_its_place_from_its_index(place: int, capsys: pytest.CaptureFixture[str]) -> None:
    table = manifest(capsys, "--name", "my-run", "--python", "echo", "--mount", "/")
    job = table["spec"]["replicatedJobs"][0]["template"]["spec"]
    command = job["template"]["spec"]["containers"][0]["command"]
    pod = {"JOB_COMPLETION_INDEX": str(place), "POD_IP": "10.1.2.3", "PATH": "/usr/bin:/bin"}
    said = subprocess.run(command, env=pod, capture_output=True, text=True, check=True).stdout
    preflight, agent = (part.split() for part in said.split("--then"))
    assert f"--node-rank={place}" in preflight
    assert {f"--rdzv-conf=is_host={1 - place}", "--local-addr=10.1.2.3"} <= set(agent)
    assert "--rdzv-endpoint=my-run-workers-0-0.my-run:29500" in agent


def test_names_and_tolerations_that_kubernetes_would_refuse(capsys: pytest.CaptureFixture[str]) -> None:
    needed = ("kubernetes", BASE, *TWO_NODES, "--image", "i", "--claim", "c")
    for options, words in (
        (("--name", "My_Run"), "use up to 40 of a-z"),
        (("--name", "7b"), "beginning with a letter"),
        (("--name", "x" * 41), "use up to 40 of a-z"),
        (("--toleration", "gpu:Sometimes"), "write it as KEY"),
        (("--node-selector", "gpu"), "write it as LABEL=VALUE"),
    ):
        status, said = refused(capsys, *needed, *options)
        assert (status, words in said) == (2, True), said
    assert parse_toleration("a=b") == {"key": "a", "operator": "Equal", "value": "b"}


def test_a_ray_job_may_take_as_long_to_stop_as_its_ranks_to_save(capsys: pytest.CaptureFixture[str]) -> None:
    grace = ("--", "--set", "checkpoint.grace_s=100")
    text = launched(capsys, "ray", BASE, *TWO_NODES, "--gpus-per-node", "1", "--dry-run", *grace)
    submitted, first, second = commands(text)
    words = shlex.split(submitted)
    assert words[1:5] == ["-m", "ray.scripts.scripts", "job", "submit"]
    (runtime,) = (word for word in words if word.startswith("--runtime-env-json="))
    variables = json.loads(runtime.partition("=")[2])["env_vars"]
    assert variables["RAY_JOB_STOP_WAIT_TIME_S"] == "115"
    assert first == second == words[-1].removeprefix("--line=")
    assert {"--follow-stdin", "--nproc-per-node=1"} <= set(shlex.split(first))


def test_a_ray_cluster_on_the_network_needs_a_token(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    status, said = refused(capsys, "ray", BASE, *TWO_NODES, "--address", "http://10.0.0.1:8265")
    assert status == 1
    assert "--address http://10.0.0.1:8265 is not on this machine" in said
    assert "RAY_AUTH_MODE=token" in said


def test_the_recipe_of_these_tests_has_two_ranks() -> None:
    assert resolve(load_recipe(BASE))["mesh"]["dp"] == 2

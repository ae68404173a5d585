"""Kubernetes: the JobSet of a run, one pod per node.

A pod that is evicted, or was asked to end (exit status 75 once its ranks have saved, 143 before there were
any), fails its Job by the pod failure policy, and the JobSet starts again without counting; other failures
are counted.
"""

from __future__ import annotations

import math
import re
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from launch.clusters.agent import Agents
from launch.clusters.work import Work, node_line
from trellis_dist.training.job import EXIT_TERMINATED

__all__ = ["Pods", "apply", "job_set", "master_of", "name_of", "parse_label", "parse_toleration", "render"]

WORKERS = "workers"
# Beside the grace: the step in work, and the agent's own end.
MARGIN_S = 30
# The end by SIGTERM itself: the pod was asked to end before its agent could answer.
_BEFORE_RANKS = 128 + signal.SIGTERM
# Filled in by the pod's shell.
_PLACE, _FIRST, _ADDRESS = "PLACE_OF_POD", "FIRST_OR_NOT", "ADDRESS_OF_POD"
# A DNS label as RFC 1035 has it: the network is a Service, and JobSet refuses a digit at the beginning.
_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")


@dataclass(frozen=True, kw_only=True)
class Pods:
    """What is asked of Kubernetes for each pod.

    Attributes:
        image: holds the checkout and its packages.
        claim, mount: the PersistentVolumeClaim of run folder and data set, and where pods see it.
        gpus: nvidia.com/gpu; 0 for none.
        cpus, memory: as Kubernetes takes them; None leaves them to the cluster.
        node_selector: labels of the nodes.
        tolerations: as of a pod.
        job_restarts: of the whole JobSet after failures.
    """

    image: str
    claim: str
    mount: str = "/work"
    gpus: int = 0
    cpus: str | None = None
    memory: str | None = None
    node_selector: tuple[tuple[str, str], ...] = ()
    tolerations: tuple[dict[str, str], ...] = ()
    job_restarts: int = 3


def name_of(work: Work, given: str | None) -> str:
    """The JobSet's name: what is given, or one made from the recipe's.

    Raises:
        ValueError: it is no DNS label, or too long: pods are called NAME-workers-0-N.
    """
    name = given or re.sub(r"[^a-z0-9]+", "-", f"trellis-{work.loaded.name}".lower()).strip("-")[:40].strip(
        "-"
    )
    if not _LABEL.fullmatch(name) or len(name) > 40:
        raise ValueError(
            f"--name {name}: use up to 40 of a-z, 0-9 and -, beginning with a letter and ending with no -; "
            "pods and their network are called by it"
        )
    return name


def master_of(name: str) -> str:
    """The address of the first pod, which the JobSet's headless service makes known before it is ready."""
    return f"{name}-{WORKERS}-0-0.{name}"


def parse_toleration(text: str) -> dict[str, str]:
    """``KEY[=VALUE][:EFFECT]`` as Kubernetes wants it.

    Raises:
        ValueError: no key, or an effect that is none.
    """
    rest, _, effect = text.partition(":")
    key, equals, value = rest.partition("=")
    if not key or effect not in ("", "NoSchedule", "PreferNoSchedule", "NoExecute"):
        raise ValueError(
            f"--toleration {text}: write it as KEY[=VALUE][:EFFECT] with the effect NoSchedule, "
            "PreferNoSchedule or NoExecute"
        )
    toleration = {"key": key, "operator": "Equal" if equals else "Exists"}
    return {**toleration, **({"value": value} if equals else {}), **({"effect": effect} if effect else {})}


def parse_label(text: str) -> tuple[str, str]:
    """``LABEL=VALUE`` of a node selector.

    Raises:
        ValueError: it has no label or no value.
    """
    label, _, value = text.partition("=")
    if not label or not value:
        raise ValueError(f"--node-selector {text}: write it as LABEL=VALUE")
    return label, value


def job_set(
    agents: Agents, work: Work, pods: Pods, *, name: str, namespace: str | None = None
) -> dict[str, Any]:
    """The JobSet (jobset.x-k8s.io/v1alpha2) as a table."""
    metadata = {
        "name": name,
        "labels": {"app.kubernetes.io/name": "trellis", "app.kubernetes.io/instance": name},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {**metadata, **({"namespace": namespace} if namespace else {})},
        "spec": {
            "network": {"enableDNSHostnames": True, "subdomain": name, "publishNotReadyAddresses": True},
            "failurePolicy": {
                "maxRestarts": pods.job_restarts,
                "rules": [
                    {
                        "name": "preempted",
                        "action": "RestartJobSetAndIgnoreMaxRestarts",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }
                ],
            },
            "replicatedJobs": [
                {"name": WORKERS, "replicas": 1, "template": {"spec": _job(agents, work, pods)}}
            ],
        },
    }


def _job(agents: Agents, work: Work, pods: Pods) -> dict[str, Any]:
    return {
        "parallelism": agents.nodes,
        "completions": agents.nodes,
        "completionMode": "Indexed",
        "backoffLimit": 0,  # one pod that fails takes the others with it: the JobSet starts all again
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {
                        "containerName": "trellis",
                        "operator": "In",
                        "values": [EXIT_TERMINATED, _BEFORE_RANKS],
                    },
                },
                {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]
        },
        "template": {"spec": _pod(agents, work, pods)},
    }


def _pod(agents: Agents, work: Work, pods: Pods) -> dict[str, Any]:
    volumes = [
        {"name": "work", "persistentVolumeClaim": {"claimName": pods.claim}},
        # Ranks of a node, and data loaders, share memory; 64 MB is what a container has otherwise.
        {"name": "shm", "emptyDir": {"medium": "Memory"}},
    ]
    return {
        "restartPolicy": "Never",
        # Process 1 of a container ignores a SIGTERM that it does not handle, as the agent does not while it
        # is loaded: with this a process of Kubernetes is number 1.
        "shareProcessNamespace": True,
        "terminationGracePeriodSeconds": math.ceil(agents.grace_s) + MARGIN_S,
        "containers": [_container(agents, work, pods)],
        "volumes": volumes,
        **({"nodeSelector": dict(pods.node_selector)} if pods.node_selector else {}),
        **({"tolerations": [dict(item) for item in pods.tolerations]} if pods.tolerations else {}),
    }


def _container(agents: Agents, work: Work, pods: Pods) -> dict[str, Any]:
    amounts = {
        "cpu": pods.cpus,
        "memory": pods.memory,
        "nvidia.com/gpu": str(pods.gpus) if pods.gpus else None,
    }
    asked = {kind: amount for kind, amount in amounts.items() if amount}
    return {
        "name": "trellis",
        "image": pods.image,
        "command": ["bash", "-c", _script(agents, work)],
        "workingDir": pods.mount,
        "env": [{"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}],
        "volumeMounts": [{"name": "work", "mountPath": pods.mount}, {"name": "shm", "mountPath": "/dev/shm"}],
        **({"resources": {"requests": asked, "limits": asked}} if asked else {}),
    }


def _script(agents: Agents, work: Work) -> str:
    """What a pod runs; Kubernetes tells it its place in JOB_COMPLETION_INDEX."""
    line = node_line(
        agents,
        work,
        place=_PLACE,
        local_address=None if agents.rendezvous == "static" else _ADDRESS,
        hosts_store=None if agents.rendezvous == "static" else _FIRST,
    )
    for words, variable in ((_PLACE, "$JOB_COMPLETION_INDEX"), (_FIRST, "$first"), (_ADDRESS, "$POD_IP")):
        line = line.replace(words, variable)
    return f'first=0; [ "$JOB_COMPLETION_INDEX" != 0 ] || first=1; {line}'


def render(table: dict[str, Any]) -> str:
    """The table as YAML."""
    import yaml

    dumper: Any = type("Dumper", (yaml.SafeDumper,), {"ignore_aliases": lambda *_: True})
    text: str = yaml.dump(table, Dumper=dumper, sort_keys=False, width=10**6)
    return text


def apply(text: str, *, command: Sequence[str] = ("kubectl", "apply", "-f", "-")) -> int:
    """Hand the manifest to the cluster; kubectl says what became of it.

    Raises:
        FileNotFoundError: there is no kubectl here.
    """
    try:
        return subprocess.run(list(command), input=text, text=True, check=False).returncode
    except FileNotFoundError:
        raise FileNotFoundError(
            "kubectl is not here: install it, or pipe the dry run to one elsewhere"
        ) from None

"""Runs over several hosts that lose a rank, an agent, a host or a cable, and preflights of four hosts.

    python -m benchmarks.nodes --work DIR [--only NAME ...]

The hosts are network namespaces of this machine (benchmarks/namespaces.py), the runs are
launch/torchrun/train.sh of a tiny model, one rank a host. A run that was killed goes on after its last row.
It writes benchmarks/results/nodes.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.faults.rank_job import STEPS, compare, sources
from benchmarks.kernels.record import Case, Deadline, Record
from benchmarks.machine import machine, versions
from benchmarks.namespaces import Hosts
from benchmarks.node_runs import TIMEOUT_S, NodeRun, environment, preflight_command
from launch.failures import cause_of, read_failures, report
from trellis_dist.training.job import EXIT_TERMINATED

__all__ = ["RESULT", "cases", "main", "render"]

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "nodes.json"
AT_STEP = 7
# Beyond the timeout of a step: judging takes up to 5 s, and torch's agent looks at its ranks now and then.
PATIENCE_S = 90.0
LONG = {"training.steps": 100_000}
SLOW_MEGABITS = 40

Harm = Callable[[NodeRun, int], None]
HARMS: dict[str, Harm] = {
    "killed rank": lambda run, host: run.kill_ranks(host),
    "killed host": lambda run, host: run.hosts.kill(host),
    "cut link": lambda run, host: run.hosts.cut(host),
}


def whole(work: Path, hosts: int) -> Path:
    """The run that nobody disturbed, made once."""
    folder = work / f"whole-{hosts}-{sources()}"
    if not (folder / "checkpoints" / f"step-{STEPS:08d}").is_dir():
        with (
            Hosts(hosts, work) as network,
            NodeRun(network, folder, work, {"training.steps": STEPS}, "--no-preflight") as run,
        ):
            if any(run.end()):
                raise RuntimeError(run.said(0)[-300:])
    return folder


def recovers(work: Path, harm: str, hosts: int) -> dict[str, Any]:
    """Do ``harm`` to the last host of a run with restarts, and wait for its end."""
    folder, reference = _folder(work), whole(work, hosts)
    options = ("--no-preflight", "--max-restarts", "2")
    with (
        Hosts(hosts, work) as network,
        NodeRun(network, folder, work, {"training.steps": STEPS}, *options) as run,
    ):
        run.wait_for_step(AT_STEP)
        HARMS[harm](run, hosts - 1)
        begin = time.monotonic()
        statuses = run.end()
        seconds = time.monotonic() - begin
        lines = [line for host in range(hosts) for line in run.errors(host)]
    different, named = compare(folder, reference), _named(network, lines)
    ok = not different and not any(statuses) and named == [network.names[-1]]
    outcome = "finished, equal in every bit" if not different else f"statuses {statuses}; {different}"
    outcome += f"; named: {', '.join(named) or 'nobody'}"
    return {"passed": ok, "outcome": outcome, "until_end_s": round(seconds, 1), "lines": lines}


def saves(work: Path, hosts: int) -> dict[str, Any]:
    """Kill the last host's agent: its ranks end with it, all save and end, and the same command goes on."""
    folder, reference = _folder(work), whole(work, hosts)
    settings, options = {"training.steps": STEPS}, ("--no-preflight", "--max-restarts", "2")
    with Hosts(hosts, work) as network:
        with NodeRun(network, folder, work, settings, *options) as run:
            run.wait_for_step(AT_STEP)
            run.kill_agent(hosts - 1)
            begin = time.monotonic()
            statuses = run.end(limit_s=PATIENCE_S)[:-1]
            seconds = time.monotonic() - begin
            lines = [line for host in range(hosts) for line in run.errors(host)]
        with NodeRun(network, folder, work, settings, *options) as again:
            later = again.end()
    different, named = compare(folder, reference), _named(network, lines)
    asked = all(status == EXIT_TERMINATED for status in statuses)
    ok = asked and not any(later) and not different and named in ([], [network.names[-1]])
    outcome = f"ended with status {' '.join(map(str, sorted(set(statuses))))}; started again: "
    outcome += different or "finished, equal in every bit"
    return {"passed": ok, "outcome": outcome, "until_end_s": round(seconds, 1), "lines": lines}


def ends(
    work: Path, harm: str, hosts: int, *, static: bool = False, host: int | None = None
) -> dict[str, Any]:
    """Do ``harm`` to a host (the last) of a run without restarts: all others end, and that host is named."""
    folder, victim = _folder(work), hosts - 1 if host is None else host
    with (
        Hosts(hosts, work) as network,
        NodeRun(network, folder, work, LONG, "--no-preflight", static=static) as run,
    ):
        run.wait_for_step(AT_STEP)
        HARMS[harm](run, victim)
        begin, others = time.monotonic(), [other for other in range(hosts) if other != victim]
        if host == 0:  # torch's agents, whose store was there, need minutes to see it: the ranks do not
            run.wait(lambda: run.errors(1) != [] and not run.alive(others), limit_s=PATIENCE_S)
        else:
            run.end(others, limit_s=PATIENCE_S)
        seconds = time.monotonic() - begin
        lines = [line for other in others for line in run.errors(other)]
        cause = report(cause_of(read_failures(folder)))
    named = _named(network, [*lines, cause])
    ok = named == [network.names[victim]]
    return {
        "passed": ok,
        "outcome": f"ended; named: {', '.join(named) or 'nobody'}",
        "until_end_s": round(seconds, 1),
        "lines": lines,
        "cause": cause,
    }


def _named(network: Hosts, lines: Sequence[str]) -> list[str]:
    """Hosts named by what a line says of them: a rank that only says where it is itself names nobody."""
    return [name for name in network.names if any(_blames(line, name) for line in lines)]


def _blames(line: str, name: str) -> bool:
    """Whether a line says of a host that it, or its rank, is gone."""
    host = re.escape(name)
    words = (
        rf"rank \d+ \({host}, pid \d+\) has (not been heard of|ended)",
        rf"no word from .*\bon {host}\b",
        rf"rank \d+ on {host}: killed by",
        rf"{host} itself is cut off",
        rf"the job's store on {host} does not answer",
    )
    return any(re.search(text, line) for text in words)


def compared(work: Path, hosts: int, *, slow: int | None = None) -> dict[str, Any]:
    """A preflight of ``hosts``; with ``slow`` a host whose link is throttled, which must be named."""
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    line = preflight_command(work, _folder(work), hosts, "--json")
    with Hosts(hosts, work) as network:
        if slow is not None:
            network.shape(slow, SLOW_MEGABITS)
        started = [network.popen(host, line, env=environment(), **options) for host in range(hosts)]
        said = [process.communicate(timeout=300.0) for process in started]
    reports = [json.loads(out) for out, _ in said]
    problems = [problem["line"] for problem in reports[0]["problems"]]
    named = [problem["host"] for problem in reports[0]["problems"]]
    expected = [] if slow is None else [f"host{slow}"]
    return {
        "passed": named == expected and all(found == reports[0] for found in reports),
        "outcome": "passed" if not problems else f"named: {', '.join(named)}",
        "lines": problems,
        **{
            key: reports[0][key]
            for key in ("all_reduce", "links", "node_bandwidth", "clocks")
            if key in reports[0]
        },
        "preflight_s": reports[0]["seconds"],
    }


def _folder(work: Path) -> Path:
    return work / f"run-{time.time_ns()}"


def cases(work: Path) -> list[Case]:
    """Every row, by name."""
    found: dict[str, Callable[[], dict[str, Any]]] = {
        "4 hosts: preflight": lambda: compared(work, 4),
        "4 hosts: preflight, one link throttled": lambda: compared(work, 4, slow=2),
    }
    for hosts in (2, 4):
        for harm in HARMS:
            again = harm == "killed rank"
            name = f"{hosts} hosts: {harm}, c10d, {'restarts' if again else 'no restarts'}"
            found[name] = functools.partial(recovers if again else ends, work, harm, hosts)
        found[f"{hosts} hosts: killed agent, c10d, restarts"] = functools.partial(saves, work, hosts)
    found["4 hosts: cut link of the first host, c10d, no restarts"] = lambda: ends(
        work, "cut link", 4, host=0
    )
    # Static with restarts is refused: launch/clusters/agent.py.
    found["2 hosts: killed rank, static, no restarts"] = lambda: ends(work, "killed rank", 2, static=True)
    return [Case(name, measure) for name, measure in found.items()]


def render(found: dict[str, Any]) -> str:
    """The table of docs/troubleshooting.md."""
    lines = ["| what happens | what became of it | after |", "|---|---|---|"]
    for name, row in sorted(found["cases"].items()):
        seconds = row.get("until_end_s", row.get("preflight_s"))
        lines.append(f"| {name} | {row.get('outcome', row.get('error'))} | {seconds} s |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is left; 1 where a row did not pass."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.nodes", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--only", nargs="+", default=[], help="only rows whose names hold one of these words")
    parser.add_argument("--output", type=Path, default=RESULT)
    given = parser.parse_args(arguments)
    given.work.mkdir(parents=True, exist_ok=True)
    identity = {
        "machine": machine(),
        "versions": versions(),
        "sources": sources(),
        "step_timeout_s": TIMEOUT_S,
        "at_step": AT_STEP,
    }
    record = Record(given.output, identity)
    every = cases(given.work)
    chosen = [case for case in every if not given.only or any(word in case.name for word in given.only)]
    record.run(chosen, Deadline())
    if not record.left(every):
        record.finish()
    failed = [name for name, found in record.cases.items() if not found.get("passed")]
    print(f"wrote {given.output}" + (f"; not as promised: {'; '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

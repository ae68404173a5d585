"""Several hosts on one machine: network namespaces with addresses and names of their own, on one bridge.

    with Hosts(2, work) as hosts:
        one = hosts.popen(0, ["hostname"], stdout=subprocess.PIPE, text=True)     # "host0", at 10.77.0.1
        hosts.cut(1)                                                              # its cable is pulled

Needs no root: a user namespace holds them all (`unshare -r`). They share every file, except where
`mount_apart` gives a host a folder of its own.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["Hosts", "refusal"]

NETWORK = "10.77.0"
BRIDGE = "switch"
# A holder keeps namespaces alive for as long as its standard input, a pipe from this process, is open. When
# this process dies, however it does, the holder ends what still runs in its network.
HOLD = """echo ready
while read -r line; do :; done
here=$(readlink /proc/$$/ns/net)
for round in 1 2 3 4 5; do
  for process in /proc/[0-9]*; do
    if [ "${process#/proc/}" != $$ ] && [ "$(readlink "$process/ns/net" 2>/dev/null)" = "$here" ]; then
      kill -9 "${process#/proc/}" 2>/dev/null
    fi
  done
done"""
LIMIT_S = 30.0
# What a process may have been told of its own machine's network and ranks, and a host must not inherit.
_OF_A_MACHINE = (
    "GLOO_SOCKET_IFNAME",
    "NCCL_SOCKET_IFNAME",
    "MASTER_ADDR",
    "MASTER_PORT",
    "RANK",
    "WORLD_SIZE",
)


class Hosts:
    """``count`` hosts ``host0``, ``host1``, ... with addresses 10.77.0.1, 10.77.0.2, ...

    Leaving the context ends every process in them.
    """

    def __init__(self, count: int, work: Path) -> None:
        """Set them up; their table of names is kept in ``work``. Raises OSError where they are refused."""
        self.names = [f"host{index}" for index in range(count)]
        self.addresses = [f"{NETWORK}.{index + 1}" for index in range(count)]
        self._open = contextlib.ExitStack()
        table = work / "hosts"
        lines = [f"{address} {name}" for address, name in zip(self.addresses, self.names, strict=True)]
        table.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]), encoding="utf-8")
        try:
            self._switch = self._hold(["unshare", "--user", "--map-root-user", "--net", "--mount"], HOLD)
            self._in_switch(
                f"ip link set lo up && ip link add {BRIDGE} type bridge && ip link set {BRIDGE} up"
            )
            self._holders = [self._add(index, table) for index in range(count)]
        except BaseException:
            self._open.close()
            raise

    def __enter__(self) -> Hosts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for index in range(len(self._holders)):
            self.kill(index)
        self._open.close()

    def command(self, host: int, arguments: Sequence[str], *, cwd: Path | None = None) -> list[str]:
        """The command line that runs ``arguments`` on ``host``; it becomes that process, with the same id."""
        place = ["env", f"--chdir={cwd or Path.cwd()}"]
        return [*self._enter(self._holders[host]), "--net", "--uts", *place, *arguments]

    def popen(
        self, host: int, arguments: Sequence[str], *, env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[Any]:
        """Start a process on ``host``, as the leader of a process group; ``options`` are subprocess's."""
        line = self.command(host, arguments)
        own = {name: value for name, value in os.environ.items() if name not in _OF_A_MACHINE}
        return subprocess.Popen(line, env={**own, **(env or {})}, start_new_session=True, **options)

    def cut(self, host: int) -> None:
        """Pull the cable of ``host``: what is sent to it or by it is lost, and nobody is told."""
        self._in_switch(f"ip link set port{host} down")

    def mend(self, host: int) -> None:
        """Put the cable back."""
        self._in_switch(f"ip link set port{host} up")

    def shape(self, host: int, megabits: int) -> None:
        """Let no more than ``megabits`` per second go to or from ``host``. Raises OSError without ``tc``."""
        limit = f"root tbf rate {megabits}mbit burst 64kb latency 200ms"
        self._in_switch(f"tc qdisc add dev port{host} {limit}")
        self._run(
            [*self._enter(self._holders[host]), "--net", "tc", "qdisc", "add", "dev", "eth0", *limit.split()]
        )

    def mount_apart(self, host: int, folder: Path) -> None:
        """Give ``host`` an empty file system of its own at ``folder``."""
        self._run([*self._enter(self._holders[host]), "mount", "-t", "tmpfs", "apart", str(folder)])

    def processes(self, host: int) -> list[int]:
        """Ids of what runs on ``host``, but for what holds it."""
        holder = self._holders[host].pid
        return [pid for pid in _processes_in(_network(holder)) if pid != holder]

    def kill(self, host: int, number: signal.Signals = signal.SIGKILL) -> None:
        """Send every process on ``host`` a signal, until none is left for SIGKILL."""
        while found := self.processes(host):
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            if number != signal.SIGKILL:
                return

    def _add(self, index: int, table: Path) -> subprocess.Popen[str]:
        inside = f"hostname {self.names[index]} && mount --bind {table} /etc/hosts || exit 1\n{HOLD}"
        namespaces = ["unshare", "--net", "--uts", "--mount"]
        holder = self._hold([*self._enter(self._switch), *namespaces], inside)
        port = f"port{index}"
        self._in_switch(
            f"ip link add name {port} type veth peer name eth0 netns {holder.pid} && "
            f"ip link set {port} master {BRIDGE} up"
        )
        address = (
            f"ip link set lo up && ip addr add {self.addresses[index]}/24 dev eth0 && ip link set eth0 up"
        )
        self._run([*self._enter(holder), "--net", "sh", "-c", address])
        return holder

    def _hold(self, namespaces: Sequence[str], script: str) -> subprocess.Popen[str]:
        holder = subprocess.Popen(
            [*namespaces, "sh", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is this process's to handle, which needs the holders for it
        )
        self._open.callback(_end, holder)
        said, wrong = holder.stdout, holder.stderr
        if said is None or wrong is None or said.readline() != "ready\n":
            raise OSError(f"no namespaces here: {wrong.read().strip() if wrong else ''}")
        return holder

    def _enter(self, holder: subprocess.Popen[str]) -> list[str]:
        return ["nsenter", f"--target={holder.pid}", "--user", "--mount", "--preserve-credentials"]

    def _in_switch(self, script: str) -> None:
        self._run([*self._enter(self._switch), "--net", "sh", "-c", script])

    def _run(self, line: Sequence[str]) -> None:
        ran = subprocess.run(line, capture_output=True, text=True, timeout=LIMIT_S)
        if ran.returncode:
            raise OSError(f"{' '.join(line)}: {ran.stderr.strip()}")


def _end(holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.communicate()


def _network(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/ns/net")


def _processes_in(network: str) -> list[int]:
    found = []
    for path in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # gone, or another user's
            if path.name.isdigit() and _network(int(path.name)) == network and not _is_dead(path):
                found.append(int(path.name))
    return found


def _is_dead(process: Path) -> bool:
    """A zombie, which its parent has not asked for yet."""
    return (process / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z"


@functools.cache
def refusal() -> str:
    """Why there can be no hosts here; empty where they work."""
    try:
        with tempfile.TemporaryDirectory() as work, Hosts(2, Path(work)) as hosts:
            for index in (0, 1):
                hosts._run(hosts.command(index, ["true"]))
    except (OSError, subprocess.SubprocessError) as error:
        return f"network namespaces (unshare, nsenter, ip) do not work here: {error}"
    return ""

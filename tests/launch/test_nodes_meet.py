"""Nodes that meet on one machine, each in a thread: who comes, who differs, and strangers at the door."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.nodes import check, reach
from launch.nodes import meet as meeting
from launch.nodes.channel import LONGEST_LINE, Channel
from launch.nodes.check import Local, meet, render
from launch.nodes.meet import PROTOCOL, Call, MeetingError
from launch.nodes.ports import holder_of, parse_endpoint
from launch.nodes.verdict import same_machine, unreached

FACTS: dict[str, Any] = {
    "python": "3.11.7",
    "packages": {"torch": "2.13.0", "deepspeed": "0.18.0"},
    "cuda": "none",
    "nccl": "none",
    "driver": "none",
    "source": "5" * 64,
    "recipe": {"optimizer": {"lr": 0.1}, "training": {"steps": 10}},
    "data": "d" * 64,
    "devices": [],
    "disk_free": 1,
    "mesh": [2, 1, 1],
    "problems": [],
}
LIMIT_S = 60.0


def free_port() -> int:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return int(door.getsockname()[1])


def local(tmp_path: Path, clock: Callable[[], float] = time.time, **changes: Any) -> Local:
    return Local(facts=lambda: FACTS | changes, run_dir=tmp_path, clock=clock, bandwidth=False)


def gather(
    locals_: list[Local],
    *,
    calls: list[Call] | None = None,
    port: int | None = None,
    seconds: float = LIMIT_S,
) -> list[Any]:
    """What each node's ``meet`` returns or raises."""
    place = f"127.0.0.1:{port or free_port()}"
    count = len(locals_)
    calls = calls or [Call(nodes=count, ranks=1, place=index, host=f"host{index}") for index in range(count)]
    found: list[Any] = [None] * count

    def run(index: int) -> None:
        try:
            found[index] = meet(locals_[index], call=calls[index], rendezvous=place, seconds=seconds)
        except Exception as error:
            found[index] = error

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    return found


def lines(report: dict[str, Any]) -> list[str]:
    return [problem["line"] for problem in report["problems"]]


def test_equal_nodes_pass_and_all_have_the_same_report(tmp_path: Path) -> None:
    reports = gather([local(tmp_path) for _ in range(4)])
    assert [report["passed"] for report in reports] == [True] * 4
    assert all(report == reports[0] for report in reports)
    assert [node["host"] for node in reports[0]["nodes"]] == ["host0", "host1", "host2", "host3"]
    assert "the run folder is shared" in "\n".join(render(reports[0]))
    assert list(tmp_path.iterdir()) == [], "the token is taken away"


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"packages": {**FACTS["packages"], "torch": "2.9"}}, "torch 2.9, 2 of 3 nodes have 2.13.0: install"),
        ({"python": "3.12.0"}, "python 3.12.0, 2 of 3 nodes have 3.11.7: install the same on every node"),
        ({"source": "6" * 64}, "this project's source 666666666666, 2 of 3 nodes have 555555555555: check"),
        (
            {"recipe": {"optimizer": {"lr": 0.1}, "training": {"steps": 20}}},
            "another recipe: training.steps 20, not 10: start every node with the same recipe",
        ),
        ({"data": "e" * 64}, "data set eeeeeeeeeeee, 2 of 3 nodes have dddddddddddd: put the data set on a"),
        ({"devices": [{"name": "H100", "memory": 80 * 2**30}]}, "devices: 1 x H100 (80 GiB), 2 of 3"),
        ({"problems": ["/run has 0.1 GB free: free some"]}, "/run has 0.1 GB free: free some"),
        ({"driver": "550"}, "NVIDIA driver 550, 2 of 3 nodes have none"),
    ],
)  # fmt: skip
def test_the_node_that_differs_is_named(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    reports = gather([local(tmp_path), local(tmp_path), local(tmp_path, **changes)])
    for report in reports:
        assert not report["passed"]
        assert len(report["problems"]) == 1
        assert lines(report)[0].startswith(f"node 2 (host2, 127.0.0.1): {words}")
    clean = gather([local(tmp_path, **changes)] * 2)
    assert [report["passed"] for report in clean] == ["problems" not in changes] * 2


def test_of_several_that_differ_the_first_is_named_first(tmp_path: Path) -> None:
    odd = [local(tmp_path, python="3.12.0"), local(tmp_path, data="e" * 64)]
    report = gather([local(tmp_path), odd[1], local(tmp_path), odd[0], local(tmp_path)])[0]
    assert [problem["host"] for problem in report["problems"]] == ["host1", "host3"]


def test_what_every_node_says_names_none(tmp_path: Path) -> None:
    report = gather([local(tmp_path, problems=["mesh.dp = 3: 2 ranks"])] * 2)[1]
    assert lines(report) == ["mesh.dp = 3: 2 ranks"]
    assert report["problems"][0]["host"] is None


@pytest.mark.parametrize("ahead, direction", [(30.0, "ahead of"), (-30.0, "behind")])
def test_a_wrong_clock_is_measured_and_named(ahead: float, direction: str, tmp_path: Path) -> None:
    wrong = local(tmp_path, clock=lambda: time.time() + ahead)
    report = gather([local(tmp_path), wrong, local(tmp_path)])[2]
    assert lines(report)[0].startswith(
        f"node 1 (host1, 127.0.0.1): its clock is 30.0 s {direction} the others'"
    )
    assert abs(report["clocks"][1][0] - ahead) <= report["clocks"][1][1] + 1e-3
    first = gather([wrong, local(tmp_path), local(tmp_path)])[0]
    assert lines(first)[0].startswith("node 0 (host0, 127.0.0.1): its clock is 30.0 s")


def test_a_folder_that_is_not_shared_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.nodes.folder.TOKEN_S", 0.2)
    for name in ("shared", "apart"):
        (tmp_path / name).mkdir()
    places = [local(tmp_path / name) for name in ("shared", "shared", "apart")]
    report = gather(places)[0]
    assert len(report["problems"]) == 1
    assert lines(report)[0].startswith("node 2 (host2, 127.0.0.1): run folder: ")
    assert "is not the folder that rank 0 writes to" in lines(report)[0]


@pytest.mark.parametrize(
    "second, words",
    [
        ({"nodes": 3}, "--nodes 3, the other node has 2: start every node with the same --nodes"),
        ({"ranks": 8}, "--ranks-per-node 8, the other node has 1: start every node with the same"),
    ],
)
def test_nodes_that_were_started_differently_are_named(
    second: dict[str, Any], words: str, tmp_path: Path
) -> None:
    calls = [{"nodes": 2, "ranks": 1, "place": place, "host": f"host{place}"} for place in (0, 1)]
    given = [Call(**calls[0]), Call(**(calls[1] | second))]  # type: ignore[arg-type]
    for report in gather([local(tmp_path)] * 2, calls=given):
        assert lines(report)[0].startswith(f"node 1 (host1, 127.0.0.1): {words}")


def test_of_two_that_want_to_be_the_first_one_is_refused(tmp_path: Path) -> None:
    call, port = Call(nodes=2, ranks=1, place=0, host="host"), free_port()
    door = meeting.open_door("127.0.0.1", port, place=0, seconds=LIMIT_S)
    assert door is not None
    with door, pytest.raises(MeetingError, match=rf"port {port} of 127\.0\.0\.1 is in use"):
        meet(local(tmp_path), call=call, rendezvous=f"127.0.0.1:{port}", seconds=LIMIT_S)


def test_two_processes_of_one_machine_are_no_two_nodes(tmp_path: Path) -> None:
    calls = [Call(nodes=3, ranks=1, place=place, host=host) for place, host in enumerate(("a", "b", "b"))]
    for report in gather([local(tmp_path)] * 3, calls=calls):
        (line,) = lines(report)
        assert line.startswith(
            "node 2 (b, 127.0.0.1): it is on the same machine as node 1: start the command"
        )
    assert same_machine([("a", "10.0.0.1"), ("a", "10.0.0.2"), ("b", "10.0.0.1")]) == []


def test_a_place_that_is_taken_is_named(tmp_path: Path) -> None:
    calls = [
        Call(nodes=3, ranks=1, place=place, host=f"host{index}") for index, place in enumerate((0, 1, 1))
    ]
    reports = gather([local(tmp_path)] * 3, calls=calls, seconds=30.0)
    told = [report for report in reports if isinstance(report, dict)]
    assert "--node-rank 1, as another node has: give every node its own, 0 to 2" in lines(told[0])[0]


def test_who_does_not_come_is_missed_by_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The deadline is at once when the second has come, however long that took."""
    wait = meeting._Arrivals.next
    came: list[Any] = []

    def next_(self: meeting._Arrivals, deadline: float) -> Any:
        came.append(wait(self, 0.0 if came else deadline))
        return came[-1]

    monkeypatch.setattr(meeting._Arrivals, "next", next_)
    calls = [Call(nodes=3, ranks=1, place=place, host=f"host{place}") for place in (0, 1)]
    for report in gather([local(tmp_path)] * 2, calls=calls):
        assert lines(report)[0].startswith(
            "2 of 3 nodes came (host0, host1); --node-rank 2 did not: start the same"
        )


def test_places_need_not_be_given(tmp_path: Path) -> None:
    calls = [Call(nodes=3, ranks=1, place=None, host=f"host{index}") for index in range(3)]
    reports = gather([local(tmp_path)] * 3, calls=calls)
    assert sorted(node["host"] for node in reports[0]["nodes"]) == ["host0", "host1", "host2"]
    assert reports[0]["passed"]


def test_nobody_at_the_door_is_said_with_the_reason() -> None:
    call = Call(nodes=2, ranks=1, place=1, host="host1")
    with pytest.raises(
        MeetingError, match=r"cannot reach 127\.0\.0\.1:\d+ \(refused; tried for 1 s\): start the"
    ):
        meeting.attend("127.0.0.1", free_port(), call, {}, seconds=1.0)
    with pytest.raises(
        MeetingError, match=r"\(name not known; tried for 1 s\): give the first node by an address"
    ):
        meeting.attend("no-such-host.invalid", 29500, call, {}, seconds=1.0)


def test_a_stranger_who_accepts_and_never_answers_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meeting, "GREETING_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        for place, words in ((0, "is in use by process"), (1, "is in use"), (None, "is in use")):
            call = Call(nodes=2, ranks=1, place=place, host="host")
            begin = time.monotonic()
            with pytest.raises(MeetingError, match=words.removesuffix(" by process")):
                meet(local(tmp_path), call=call, rendezvous=f"127.0.0.1:{port}", seconds=600.0)
            assert time.monotonic() - begin < LIMIT_S, "it ends long before the others' deadline"
        assert holder_of(port) == "", "this process itself is no stranger"


def test_strangers_at_the_door_hold_nobody_up(tmp_path: Path) -> None:
    port, stop = free_port(), threading.Event()
    words = [b"", b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b"[" * 100_000 + b"\n", b'{"protocol": "other"}\n']
    words += [json.dumps({"protocol": PROTOCOL, "nodes": "2"}).encode() + b"\n", b"x" * (LONGEST_LINE + 10)]
    words += [b'{"protocol": NaN}\n']
    said: list[bytes] = []

    def disturb() -> None:
        kept = []
        while not stop.is_set():
            for word in words:
                try:
                    stranger = socket.create_connection(("127.0.0.1", port), timeout=1.0)
                    stranger.sendall(word)
                    kept.append(stranger)
                    said.append(word)
                except OSError:
                    continue
            stop.wait(0.02)
        for stranger in kept:
            stranger.close()

    thread = threading.Thread(target=disturb, daemon=True)
    thread.start()

    first: list[Any] = []
    calls = [Call(nodes=2, ranks=1, place=place, host=f"host{place}") for place in (0, 1)]
    coordinator = threading.Thread(
        target=lambda: first.append(
            meet(local(tmp_path), call=calls[0], rendezvous=f"127.0.0.1:{port}", seconds=LIMIT_S)
        ),
        daemon=True,
    )
    coordinator.start()
    while len(said) < 2 * len(words):  # before the other node comes
        time.sleep(0.01)
    report = meet(local(tmp_path), call=calls[1], rendezvous=f"127.0.0.1:{port}", seconds=LIMIT_S)
    stop.set()
    coordinator.join(LIMIT_S)
    thread.join(LIMIT_S)
    assert report["passed"]
    assert first == [report]


def test_a_node_that_leaves_is_named(tmp_path: Path) -> None:
    port = free_port()
    first: list[Any] = []
    call = Call(nodes=2, ranks=1, place=0, host="host0")
    thread = threading.Thread(
        target=lambda: first.append(
            meet(local(tmp_path), call=call, rendezvous=f"127.0.0.1:{port}", seconds=LIMIT_S)
        ),
        daemon=True,
    )
    thread.start()
    leaver = meeting._reach(
        "127.0.0.1", port, Call(nodes=2, ranks=1, place=1, host="host1"), seconds=LIMIT_S, own=False
    )
    assert leaver.receive(deadline=time.monotonic() + LIMIT_S)["question"] == "facts"
    leaver.close()
    thread.join(LIMIT_S)
    assert lines(first[0])[0].startswith("node 1 (host1, 127.0.0.1): what it says about itself: ")


def test_a_first_node_that_leaves_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as door:
        port = door.getsockname()[1]

        def leave() -> None:
            channel = Channel(door.accept()[0])
            channel.receive(deadline=time.monotonic() + LIMIT_S)
            channel.send({"protocol": PROTOCOL}, deadline=time.monotonic() + LIMIT_S)
            channel.close()

        threading.Thread(target=leave, daemon=True).start()
        call = Call(nodes=2, ranks=1, place=1, host="host1")
        with pytest.raises(MeetingError, match="left before the verdict"):
            meeting.attend("127.0.0.1", port, call, {}, seconds=LIMIT_S)


@pytest.mark.parametrize("text", ["host", "host:", ":1", "host:0", "host:65536", "host:2x"])
def test_a_meeting_place_is_an_address_and_a_port(text: str) -> None:
    with pytest.raises(ValueError, match=r"give HOST:PORT, such as 10\.0\.0\.1:29500"):
        parse_endpoint(text)


def test_an_ipv6_address_has_brackets() -> None:
    assert parse_endpoint("[fd00::1]:29500") == ("fd00::1", 29500)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"nodes": 0}, "--nodes 0: use 1 or more"),
        ({"ranks": 0}, "--ranks-per-node 0: use 1 or more"),
        ({"place": 2}, "--node-rank 2: with --nodes 2 use 0 to 1"),
    ],
)
def test_numbers_that_cannot_be_are_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {"nodes": 2, "ranks": 1, "place": 0, "host": "host0"}
    call = Call(**(given | changes))
    with pytest.raises(ValueError, match=words):
        meet(local(tmp_path), call=call, rendezvous="127.0.0.1:1", seconds=1.0)


def test_a_name_of_the_first_node_that_only_it_finds_is_refused() -> None:
    call = Call(nodes=2, ranks=1, place=0, host="node0")
    door = meeting.open_door("127.0.0.1", free_port(), place=0, seconds=LIMIT_S)
    assert door is not None
    check._check_door(door, "localhost", call)
    with pytest.raises(ValueError, match=r"--rdzv node0 is 127\.0\.0\.1 on node0 itself"):
        check._check_door(door, "node0", call)
    assert door.fileno() == -1


def test_an_address_that_is_not_the_first_nodes_is_refused_there_alone() -> None:
    elsewhere = "203.0.113.7"  # of RFC 5737, nobody's
    assert meeting.open_door(elsewhere, 29500, place=None, seconds=1.0) is None
    assert meeting.open_door(elsewhere, 29500, place=1, seconds=1.0) is None
    with pytest.raises(MeetingError, match=r"203\.0\.113\.7 is no address of .* started with --node-rank 0"):
        meeting.open_door(elsewhere, 29500, place=0, seconds=1.0)


@pytest.mark.parametrize("place", [0, None])
def test_a_name_that_appears_late_is_waited_for(place: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of a pod does."""
    look_up, port = socket.getaddrinfo, free_port()
    asked: list[Any] = []

    def late(host: Any, *more: Any, **options: Any) -> Any:
        asked.append(host)
        if len(asked) < 3:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return look_up("127.0.0.1", *more, **options)

    monkeypatch.setattr(meeting, "PAUSE_S", 0.01)
    monkeypatch.setattr(socket, "getaddrinfo", late)
    door = meeting.open_door("pod-0.svc", port, place=place, seconds=LIMIT_S)
    assert door is not None
    door.close()
    asked.clear()
    with pytest.raises(MeetingError, match=r"\(name not known; tried for 0 s\): give the first node by"):
        meeting.open_door("pod-0.svc", port, place=place, seconds=0.0)


def test_a_question_that_hangs_on_a_node_is_left_and_the_node_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA that does not initialise, a dead mount: the node itself gives up, and hears the verdict."""
    monkeypatch.setattr(check, "FACTS_S", 0.5)
    ever = threading.Event()

    def hang() -> dict[str, Any]:
        ever.wait(10 * LIMIT_S)
        return FACTS

    stuck = Local(facts=hang, run_dir=tmp_path, bandwidth=False)
    try:
        for report in gather([local(tmp_path), stuck, local(tmp_path)]):
            (line,) = lines(report)
            assert line.startswith(
                "node 1 (host1, 127.0.0.1): what it says about itself: timed out: no end in 0.5 s: look at"
            )
    finally:
        ever.set()


def test_where_the_first_node_has_another_folder_it_is_named_and_not_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.nodes.folder.TOKEN_S", 0.2)
    folders = [tmp_path / name for name in ("apart", "shared", "third")]
    for folder in folders:
        folder.mkdir()
    apart, shared, third = (local(folder) for folder in folders)
    (line,) = lines(gather([apart, shared, shared])[1])
    assert line.startswith(
        "node 0 (host0, 127.0.0.1): run folder: it is not the folder that 2 of 3 nodes share: put the run on"
    )
    (line,) = lines(gather([apart, shared, third])[0])
    assert line.startswith("the run folders of the nodes are several: put the run on")
    assert [list(folder.iterdir()) for folder in folders] == [[], [], []]


@pytest.mark.parametrize(
    "closed, named, words",
    [
        ({(0, 2), (1, 2), (3, 2)}, [2], "node 2 (host2, 127.0.0.1): 3 of 3 nodes do not reach it"),
        ({(1, 2), (2, 3)}, [2], "node 2 (host2, 127.0.0.1): 2 of 3 nodes do not reach it"),
        ({(0, 1)}, [None], "no way between node 0 (host0) and node 1 (host1): look at the firewalls"),
        (set(), [None], "all-reduce between the nodes: no full mesh (on 4 nodes, which reach each other)"),
    ],
)
def test_an_all_reduce_that_fails_everywhere_names_the_node_behind_the_firewall(
    closed: set[tuple[int, int]],
    named: list[int | None],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """``closed``: who cannot connect to whom; as they are asked, the nodes of this test all connect."""

    def fail(*_: Any, **__: Any) -> dict[str, Any]:
        raise OSError("no full mesh")

    def judge(found: list[list[bool]], nodes: list[str]) -> Any:
        assert found == [[True] * 4] * 4
        return unreached([[(a, b) not in closed for b in range(4)] for a in range(4)], nodes)

    monkeypatch.setattr("launch.nodes.reduce.measure", fail)
    monkeypatch.setattr("launch.nodes.reach.unreached", judge)
    report = gather([Local(facts=lambda: FACTS, run_dir=tmp_path) for _ in range(4)])[3]
    assert [problem["node"] for problem in report["problems"]] == named
    assert lines(report)[0].startswith(words)


def test_a_port_at_which_nobody_listens_is_not_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as door:
        peers = [("127.0.0.1", door.getsockname()[1]), ("127.0.0.1", free_port())]
        assert reach._reach_all(peers) == [True, False]

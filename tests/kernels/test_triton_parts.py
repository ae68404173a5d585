"""Parts of the Triton backend (on_triton_parts.py, in a process of its own) and its table of launches."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import tune_kernels
from kernels.triton import launch
from kernels.triton.launch import KERNELS, SHARED_KIB, Launch, Row, Size
from tests.kernels import beside

ROW = Row(
    Size("sm_90", 64, 64, 64, 64, True, 2), dict.fromkeys(KERNELS, Launch(64, 64, 4, 1)), {"kind": "offline"}
)


@pytest.mark.skipif(sys.platform != "linux", reason="triton exists for Linux only")
def test_parts_equal_fp64_in_the_interpreter() -> None:
    beside.finish("test_parts_equal_fp64_in_the_interpreter")


def test_the_committed_table_is_valid_and_obeyed() -> None:
    for size, row in launch.load_table().items():
        for kernel in KERNELS:
            assert launch.parameters(kernel, size) == row.launches[kernel]


def test_a_size_without_a_row_follows_the_rule_and_fits() -> None:
    for arch, d, m, c, corrected in itertools.product(
        SHARED_KIB, (16, 48, 128), (16, 128), (1, 64, 500), (False, True)
    ):
        size = Size(arch, d, d, m, c, corrected, 2)
        found = {kernel: launch.parameters(kernel, size) for kernel in KERNELS}
        assert found["scan_forward"].tokens == found["scan_backward"].tokens
        for kernel, one in found.items():
            need = launch.shared_memory(kernel, size, tokens=one.tokens, slots=one.slots)
            assert one.tokens == 16 or need <= SHARED_KIB[arch] << 10
        mixed = launch.parameters("scan_backward", size._replace(mixing=True, corrected=False))
        assert mixed.slots == m  # such a phi needs all of a token's slots in one program


def test_an_override_holds_inside_its_context() -> None:
    size, one, two = ROW.size, Launch(16, 64, 2, 3), Launch(32, 64, 8, 1)
    before = launch.parameters("inputs", size)
    with launch.override("inputs", one):
        with launch.override("inputs", two):
            assert launch.parameters("inputs", size) == two
        assert launch.parameters("inputs", size) == one
        assert launch.parameters("decode", size) not in (one, two)
    assert launch.parameters("inputs", size) == before


def broken(**changes: Any) -> dict[str, Any]:
    return ROW.as_json() | changes


def launches(kernel: str, **changes: int) -> dict[str, Any]:
    changed = dataclasses.replace(ROW.launches[kernel], **changes)
    return {"launches": ROW.as_json()["launches"] | {kernel: dataclasses.asdict(changed)}}


@pytest.mark.parametrize(
    "rows, message",
    [
        ([broken(source={})], "row 0: source kind None"),
        ([broken(source={"kind": "guessed"})], "row 0: source kind 'guessed'"),
        ([broken(colour="red")], r"row 0: unknown entries \['colour'\]"),
        ([broken(launches={})], r"row 0: kernels \[\]"),
        ([broken(**launches("scan_forward", tokens=32))], r"row 0: tokens \[32, 64\]"),
        ([broken(**launches("inputs", slots=32))], "row 0: slots = 32 of inputs"),
        (
            [broken(launches={"inputs": {"tokens": 48, "slots": 64, "warps": 4, "stages": 1}})],
            "row 0: tokens = 48",
        ),
        ([broken(launches={"inputs": {"tokens": 64}})], "row 0: .*missing"),
        ([{}], "row 0"),
        ([3], "row 0"),
        ([broken(), broken()], "row 1: a second row"),
        ("", "a launch table"),
    ],
)
def test_a_malformed_table_is_refused(rows: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"rows": rows}) if rows != "" else "{}")
    with pytest.raises(ValueError, match=rf"table\.json: .*{message}"):
        launch.load_table(path)


def test_a_row_survives_the_file(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"rows": [ROW.as_json()]}))
    assert launch.load_table(path) == {ROW.size: ROW}


def test_candidates_of_the_tuner_make_valid_rows() -> None:
    for text in tune_kernels.SHAPES:
        shape = tune_kernels.parse_shape(text)
        size = Size(
            "sm_90", shape.width, shape.width, shape.slots, shape.chunk, shape.update == "corrected", 2
        )
        rule = {kernel: launch.rule(kernel, size) for kernel in KERNELS}
        for kernel in KERNELS:
            tried = tune_kernels.candidates(kernel, size)
            assert len(tried) > 2
            for given in tried:
                Row(size, tune_kernels.changed(rule, kernel, given, size=size), {"kind": "measured"})


def test_the_tuner_says_in_one_line_what_it_needs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune_kernels.main([]) == 2
    assert tune_kernels.main(["--shapes", "1,2,3"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert "no CUDA device" in said[0]
    assert "'1,2,3'" in said[1]


def test_the_tuner_takes_no_candidate_that_computes_something_else() -> None:
    ones, source = [torch.ones(4)], {}
    tuner = tune_kernels.Tuner(
        torch.device("cpu"), torch.float32, lambda work, n: [1.0] * n, lambda kernel, size: [], source
    )
    results = {1.0: ([1.0] * 20, ""), 1.1: ([], "differs"), float("nan"): ([], "differs")}
    for factor, (times, why) in results.items():
        found = tune_kernels._tried({}, lambda i, factor=factor: [ones[0] * factor], ones, tuner)
        assert found[0] == times
        assert found[1].startswith(why)
    times, why = tune_kernels._tried({}, lambda i: 1 / 0, ones, tuner)
    assert times == []
    assert why.startswith("ZeroDivisionError")


def test_device_times_drops_the_warm_up_and_goes_round_the_sets() -> None:
    class Clock:
        def __init__(self) -> None:
            self.prepared, self.now = 0, 0.0

        def prepare(self) -> None:
            self.prepared += 1

        def stamp(self) -> float:
            self.now += 1.0
            return self.now

        def milliseconds(self, begin: float, end: float) -> float:
            return end - begin

    clock, seen = Clock(), []
    assert tune_kernels.device_times(clock, seen.append, 4, warmup=2) == [1.0] * 4
    assert seen == list(range(6))
    assert clock.prepared == 6

"""What was saved comes back bit for bit, on any split of the ranks."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from checkpoints import save as save_module
from checkpoints.commit import CheckpointWarning, list_steps
from checkpoints.logical import Box, LogicalTensor, check_cover
from checkpoints.state import (
    CheckpointReader,
    SaveError,
    latest_verified,
    load_run_state,
    save_checkpoint,
    verify_checkpoint,
)
from tests.checkpoints.helpers import STATE, assert_holds, assert_same, contents, save, saved
from trellis_dist.files import FileSystem


@pytest.mark.parametrize("world", [1, 2, 4])
def test_round_trip_is_bitwise(tmp_path: Path, world: int) -> None:
    path = saved(tmp_path, 7, world=world)
    assert path.name == "step-00000007"
    assert verify_checkpoint(path) == []
    assert latest_verified(tmp_path) == path
    assert load_run_state(path) == {"step": 7, **STATE}
    assert CheckpointReader(path).step == 7
    assert_holds(path, contents(7))


def test_special_values_survive(tmp_path: Path) -> None:
    bits = torch.tensor([0x7FC00001, 0x7F800000, -0x80000000, 1, 0x7F800001], dtype=torch.int32)
    values = {"model/odd": bits.view(torch.float32)}  # NaN payloads, infinity, -0.0, a denormal
    assert_holds(saved(tmp_path, 1, tensors=values), values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int64, torch.int32, torch.int16, torch.int8])
def test_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    values = {"a": torch.arange(-3, 4).to(dtype), "b": torch.arange(5, dtype=torch.uint8)}
    assert_holds(saved(tmp_path, 1, tensors=values, world=2), values)


def test_state_floats_are_exact(tmp_path: Path) -> None:
    state = {"lr": 0.1 + 0.2, "tiny": 5e-324, "seed": 2**63 - 1, "text": "\u00e9\n"}
    assert load_run_state(saved(tmp_path, 1, state=state)) == state


def test_a_non_contiguous_slice_is_saved_by_value(tmp_path: Path) -> None:
    values = {"model/t": torch.randn(6, 4).t(), "model/s": torch.randn(20)[::3]}
    assert_holds(saved(tmp_path, 1, tensors=values), values)


def test_the_library_opens_the_files(tmp_path: Path) -> None:
    stored = load_file(saved(tmp_path, 3) / "rank-00000.safetensors")
    assert_same(stored["model/embed.weight@0,0"], contents(3)["model/embed.weight"])


@pytest.mark.parametrize("world", [2, 4])
def test_slices_read_back_as_other_slices(tmp_path: Path, world: int) -> None:
    reader = CheckpointReader(saved(tmp_path, 5, world=world))
    weight = contents(5)["model/embed.weight"]
    for row, column in itertools.product(range(0, 7, 3), range(5)):
        part = reader.read("model/embed.weight", offset=(row, column), shape=(min(4, 7 - row), 1))
        assert_same(part, weight[row : row + 4, column : column + 1])
    moments = contents(5)["optimizer/exp_avg/embed.weight"]
    for ranks in (1, 3, 5, 35):
        cuts = [35 * rank // ranks for rank in range(ranks + 1)]
        parts = [
            reader.read("optimizer/exp_avg/embed.weight", offset=(a,), shape=(b - a,))
            for a, b in itertools.pairwise(cuts)
        ]
        assert_same(torch.cat(parts), moments)


@st.composite
def splits(draw: st.DrawFn) -> tuple[tuple[int, ...], list[list[int]], int, list[Box]]:
    """A shape, where each dimension is cut, how many ranks share the pieces, and boxes to read."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=0, max_size=3)))
    cuts = [sorted({0, n, *draw(st.lists(st.integers(0, n), max_size=2))}) for n in shape]
    boxes = []
    for _ in range(3):
        offset = tuple(draw(st.integers(0, n)) for n in shape)
        boxes.append(
            Box(offset, tuple(draw(st.integers(0, n - a)) for n, a in zip(shape, offset, strict=True)))
        )
    return shape, cuts, draw(st.integers(1, 4)), boxes


@settings(max_examples=40, deadline=None)
@given(splits())
def test_any_split_is_read_as_any_box(
    tmp_path_factory: pytest.TempPathFactory, case: tuple[tuple[int, ...], list[list[int]], int, list[Box]]
) -> None:
    shape, cuts, world, boxes = case
    whole = torch.arange(2 * 3 * 5 * 7 * 11)[: max(1, torch.Size(shape).numel())].reshape(shape)
    ranks: list[list[LogicalTensor]] = [[] for _ in range(world)]
    spans = [list(itertools.pairwise(points)) for points in cuts]
    for index, cell in enumerate(itertools.product(*spans)):
        local = whole[tuple(slice(a, b) for a, b in cell)]
        ranks[index % world].append(LogicalTensor("model/w", shape, tuple(a for a, _ in cell), local))
    reader = CheckpointReader(_save_in_turn(tmp_path_factory.mktemp("split"), ranks))
    assert_same(reader.read("model/w"), whole)
    for box in boxes:
        part = reader.read("model/w", offset=box.offset, shape=box.shape)
        assert_same(part, whole[box.slices_from((0,) * len(shape))])


def _save_in_turn(root: Path, ranks: list[list[LogicalTensor]]) -> Path:
    """Ranks one after the other: rank 0 runs the others inside its second agreement."""
    world = len(ranks)
    calls = []

    def agree_of_rank_zero(ok: bool) -> bool:
        calls.append(ok)
        if len(calls) == 2:
            for rank in range(1, world):
                options: dict[str, Any] = {"rank": rank, "world_size": world, "agree": bool}
                save_checkpoint(root, step=1, tensors=ranks[rank], run_state={}, **options)
        return ok

    options = {"world_size": world, "agree": agree_of_rank_zero}
    return save_checkpoint(root, step=1, tensors=ranks[0], run_state={}, **options)


def test_replicas_are_taken_once(tmp_path: Path) -> None:
    weight = LogicalTensor.whole("model/w", torch.randn(4))
    path = _save_in_turn(tmp_path, [[weight], [weight]])
    assert [part.file for part in CheckpointReader(path).manifest.tensors["model/w"].slices] == [
        "rank-00000.safetensors"
    ]
    assert_same(CheckpointReader(path).read("model/w"), weight.local)


def test_a_rank_with_nothing(tmp_path: Path) -> None:
    weight = LogicalTensor.whole("model/w", torch.randn(4))
    assert_same(CheckpointReader(_save_in_turn(tmp_path, [[], [weight]])).read("model/w"), weight.local)


def _piece(start: int, stop: int, whole: int = 10, dtype: torch.dtype = torch.float32) -> LogicalTensor:
    return LogicalTensor("model/w", (whole,), (start,), torch.zeros(stop - start, dtype=dtype))


@pytest.mark.parametrize(
    "pieces, complaint",
    [
        ([_piece(0, 4), _piece(5, 10)], "hold 9 of 10 elements"),
        ([_piece(0, 6), _piece(5, 10)], "overlap"),
        ([_piece(0, 10), _piece(0, 10)], "handed over twice"),
        ([_piece(0, 5), _piece(5, 10, whole=11)], "handed over as"),
        ([_piece(0, 5), _piece(5, 10, dtype=torch.float64)], "handed over as"),
        ([LogicalTensor("c", (2,), (0,), torch.zeros(2, dtype=torch.complex64))], "complex64"),
    ],
)
def test_slices_that_do_not_make_a_tensor_are_refused(
    tmp_path: Path, pieces: list[LogicalTensor], complaint: str
) -> None:
    with pytest.raises(SaveError, match=complaint):
        save_checkpoint(tmp_path, step=1, tensors=pieces, run_state={})
    assert list(tmp_path.iterdir()) == []


def test_ranks_that_disagree_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match="one rank has"):
        _save_in_turn(tmp_path, [[_piece(0, 5)], [_piece(5, 10, whole=12)]])
    assert latest_verified(tmp_path) is None


@pytest.mark.parametrize("name", ["", "../up", "/etc/passwd", "a b", "a\n", "x" * 501, "\u00e9", "a@0"])
def test_bad_tensor_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="tensor name"):
        LogicalTensor.whole(name, torch.zeros(1))


def test_slices_outside_their_tensor_are_refused() -> None:
    for shape, offset in [((3,), (1,)), ((3, 3), (0,)), ((9,), (-1,))]:
        with pytest.raises(ValueError, match="outside"):
            LogicalTensor("model/w", shape, offset, torch.zeros(3))


def test_reads_that_cannot_be_are_refused(tmp_path: Path) -> None:
    reader = CheckpointReader(saved(tmp_path, 1))
    with pytest.raises(ValueError, match=r"no tensor 'model/none'; it has 8 \(flags"):
        reader.read("model/none")
    for offset, shape in [((5, 0), (3, 5)), ((0,), (7,)), ((-1, 0), (2, 2)), ((0, 0), (7, -1))]:
        with pytest.raises(ValueError, match="lies outside"):
            reader.read("model/embed.weight", offset=offset, shape=shape)


def test_arguments_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs `agree`"):
        save_checkpoint(tmp_path, step=1, tensors=[], run_state={}, world_size=2)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        save_checkpoint(tmp_path, step=1, tensors=[], run_state={}, rank=2, world_size=2, agree=bool)
    with pytest.raises(ValueError, match="step -1"):
        save_checkpoint(tmp_path, step=-1, tensors=[], run_state={})
    with pytest.raises(SaveError, match="JSON"):
        save_checkpoint(tmp_path, step=1, tensors=[], run_state={"loss": float("nan")})


def test_the_newest_step_is_found_among_other_names(tmp_path: Path) -> None:
    assert latest_verified(tmp_path / "absent") is None
    for step in (9, 10, 123456789):
        saved(tmp_path, step)
    for name in ("damaged-step-00000011-ab", "xstep-00000099", "step-99", "step-0000000012", "best"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000098").write_text("a file")
    assert list(list_steps(tmp_path)) == [123456789, 10, 9]
    assert latest_verified(tmp_path) == tmp_path / "step-123456789"


def test_an_existing_step_is_never_overwritten(tmp_path: Path) -> None:
    path = saved(tmp_path, 4, world=2)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with pytest.warns(CheckpointWarning, match="it is kept, and the new attempt at it was dropped"):
        results = save(tmp_path, 4, world=2, tensors=contents(5))
    assert results == [path, path]
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_damaged_step_is_set_aside_not_overwritten(tmp_path: Path) -> None:
    path = saved(tmp_path, 4)
    shard = path / "rank-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    with pytest.warns(CheckpointWarning, match=r"rank-00000\.safetensors is damaged.*set aside"):
        saved(tmp_path, 4)
    assert_holds(path, contents(4))
    aside = [item for item in tmp_path.iterdir() if item != path]
    assert len(aside) == 1
    assert aside[0].name.startswith("damaged-step-00000004-")
    assert (aside[0] / shard.name).read_bytes().endswith(b"!")


def test_saves_do_not_keep_the_loaded_tensors_tied_to_the_file(tmp_path: Path) -> None:
    path = saved(tmp_path, 1)
    reader = CheckpointReader(path)
    tensor: Tensor = reader.read("model/embed.weight")
    shard = path / "rank-00000.safetensors"
    shard.write_bytes(b"\0" * shard.stat().st_size)
    assert_same(tensor, contents(1)["model/embed.weight"])


def test_check_cover_on_grids() -> None:
    grid = [Box((i, j), (1, 2)) for i in range(3) for j in (0, 2)]
    check_cover("w", (3, 4), grid)
    with pytest.raises(ValueError, match="10 of 12"):
        check_cover("w", (3, 4), grid[1:])
    with pytest.raises(ValueError, match="overlap"):
        check_cover("w", (3, 4), [Box((0, 1), (3, 2)), *grid])


@pytest.mark.parametrize("world", [1, 2])
def test_large_ranks_are_cut_into_several_files(
    tmp_path: Path, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(save_module, "FILE_BYTES", 64)
    path = saved(tmp_path, 3, world=world, file_systems=FileSystem())
    files = sorted(file.name for file in path.glob("rank-00000*.safetensors"))
    assert files[:3] == [
        "rank-00000-001.safetensors",
        "rank-00000-002.safetensors",
        "rank-00000-003.safetensors",
    ]
    assert "rank-00000.safetensors" in files
    assert verify_checkpoint(path) == []
    assert_holds(path, contents(3))

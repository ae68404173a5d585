"""Row indexes on disk: made once, the same by whoever makes them, and made again when they do not fit."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.loader import TokenDataset
from data_pipeline.manifest import ShardInfo
from data_pipeline.pack import pack
from data_pipeline.rows import (
    build_row_index,
    check_alignment,
    needs_row_index,
    open_row_index,
    row_index_path,
    verify_row_index,
)
from data_pipeline.shard import Shard
from tests.data_pipeline.written import Documents, documents, write_dataset, write_one
from trellis_dist.files import REAL

ROOT = Path(__file__).resolve().parents[2]
KEY = {"packing": "best_fit", "sequence_length": 64, "align": 1}


@pytest.fixture
def shard(tmp_path: Path) -> ShardInfo:
    return write_one(tmp_path, "train-00000", "corpus", documents(0, 40))


def test_it_is_built_once_and_holds_the_table(shard: ShardInfo, tmp_path: Path) -> None:
    path = row_index_path(tmp_path, shard.name, **KEY)
    assert path == tmp_path / "index" / "train-00000-best_fit-64-1.rows"
    assert "is missing" in (verify_row_index(path) or "")
    counts = build_row_index(tmp_path, shard, **KEY)
    table = pack(Shard(tmp_path / shard.name).starts, **KEY)
    positions = shard.tokens - shard.documents
    assert counts == {"rows": table.num_rows, "positions": positions, "cut_documents": table.cut}
    assert verify_row_index(path) is None
    written = path.stat().st_mtime_ns, path.read_bytes()
    assert build_row_index(tmp_path, shard, **KEY) == counts
    opened = open_row_index(tmp_path, shard, **KEY)
    assert (path.stat().st_mtime_ns, path.read_bytes()) == written
    for name in ("first", "starts", "positions"):
        np.testing.assert_array_equal(getattr(opened, name), getattr(table, name))
        assert not getattr(opened, name).flags.writeable
    assert (opened.num_rows, opened.cut) == (table.num_rows, table.cut)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("packing", ["concat", "best_fit", "per_document"])
@pytest.mark.parametrize("shard_documents", [[], [[1, 2]], [[1]]])
def test_shards_of_almost_nothing(tmp_path: Path, packing: str, shard_documents: Documents) -> None:
    info = write_one(tmp_path, "train-00000", "corpus", shard_documents)
    opened = open_row_index(tmp_path, info, packing=packing, sequence_length=8, align=4)
    assert opened.positions.tolist() == [len(d) - 1 for d in shard_documents if len(d) > 1]
    assert opened.num_rows == len(opened.positions)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda raw: b"", "is no row index"),
        (lambda raw: b"X" + raw[1:], "is no row index"),
        (lambda raw: raw[:8] + b"\x09" + raw[9:], "is a row index of version 9"),
        (lambda raw: raw[:-8], "is damaged .*bytes"),
        (lambda raw: raw[:-50] + bytes([raw[-50] ^ 1]) + raw[-49:], "is damaged .*sha256"),
        (lambda raw: raw[:60] + bytes([raw[60] ^ 1]) + raw[61:], "is damaged .*sha256"),
        (lambda raw: raw[:16] + b"\x20" + raw[17:], r"is a row index of packing \('best_fit', 32, 1\)"),
    ],
)
def test_a_damaged_one_is_named_and_made_again(
    shard: ShardInfo, tmp_path: Path, damage: Callable[[bytes], bytes], words: str
) -> None:
    build_row_index(tmp_path, shard, **KEY)
    path = row_index_path(tmp_path, shard.name, **KEY)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    with pytest.raises(AssertionError, match=rf"train-00000-best_fit-64-1\.rows {words}.*delete it"):
        raise AssertionError(verify_row_index(path))
    open_row_index(tmp_path, shard, **KEY)
    assert path.read_bytes() == whole


def test_one_of_another_shard_is_made_again(tmp_path: Path) -> None:
    old, new = ({"train": {"corpus": [documents(seed, 30)]}} for seed in (1, 2))
    options = {"sequence_length": 32, "seed": 0, "packing": "best_fit"}
    before = TokenDataset(write_dataset(tmp_path, old), "train", **options)
    after = TokenDataset(write_dataset(tmp_path, new), "train", **options)
    fresh = TokenDataset(write_dataset(tmp_path / "fresh", new), "train", **options)
    assert after.num_samples == fresh.num_samples
    ours, theirs = (next((p / "index").iterdir()).read_bytes() for p in (tmp_path, tmp_path / "fresh"))
    assert ours == theirs
    assert before.fingerprint != after.fingerprint


def test_a_damaged_shard_index_never_becomes_a_table(shard: ShardInfo, tmp_path: Path) -> None:
    path = tmp_path / "train-00000.idx"
    raw = bytearray(path.read_bytes())
    raw[200] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"train-00000\.idx is damaged .*: delete it and run"):
        open_row_index(tmp_path, shard, **KEY)
    assert not (tmp_path / "index").exists()


def test_a_full_disk_is_one_line_and_leaves_nothing(
    shard: ShardInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(REAL, "fsync_file", full)
    with pytest.raises(ValueError, match=r"cannot be made here .*No space left.*: run `trellis prepare`"):
        open_row_index(tmp_path, shard, **KEY)
    assert list((tmp_path / "index").iterdir()) == []


def test_what_a_damaged_header_claims_is_not_allocated(shard: ShardInfo, tmp_path: Path) -> None:
    build_row_index(tmp_path, shard, **KEY)
    path = row_index_path(tmp_path, shard.name, **KEY)
    raw = bytearray(path.read_bytes())
    raw[32:40] = b"\xff" * 8
    path.write_bytes(raw)
    assert "is damaged" in (verify_row_index(path) or "")


def test_alignment_and_what_needs_an_index(tmp_path: Path, shard: ShardInfo) -> None:
    assert not needs_row_index("concat", 1)
    assert needs_row_index("concat", 8)
    assert needs_row_index("per_document", 1)
    with pytest.raises(ValueError, match="has no row index"):
        build_row_index(tmp_path, shard, packing="concat", sequence_length=64, align=1)
    with pytest.raises(ValueError, match=r"sequence_length = 100 is no multiple .* 16 .*: use 96 or 112"):
        check_alignment(100, 16)
    with pytest.raises(ValueError, match=r"use 16$"):
        check_alignment(10, 16)


OPEN = """
import hashlib, sys
from pathlib import Path
import data_pipeline.rows
from data_pipeline.manifest import ShardInfo

real = data_pipeline.rows.pack

def at_the_barrier(*args, **options):
    print("missing", flush=True)
    sys.stdin.readline()
    return real(*args, **options)

data_pipeline.rows.pack = at_the_barrier
table = data_pipeline.rows.open_row_index(Path(sys.argv[1]), eval(sys.argv[2]), **eval(sys.argv[3]))
arrays = (table.first, table.starts, table.positions)
print(hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest())
"""


def test_processes_that_make_one_at_the_same_time_make_the_same_bytes(
    shard: ShardInfo, tmp_path: Path
) -> None:
    """Each has found it missing before any writes it; then all do."""
    alone = tmp_path / "alone"
    alone.mkdir()
    for path in tmp_path.glob("train-*"):
        shutil.copy(path, alone)
    table = open_row_index(alone, shard, **KEY)
    expected = hashlib.sha256(b"".join(a.tobytes() for a in (table.first, table.starts, table.positions)))
    command = [sys.executable, "-c", OPEN, str(tmp_path), repr(shard), repr(KEY)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(subprocess.Popen(command, cwd=ROOT, **pipes)) for _ in range(4)]
        for process in processes:
            stack.callback(process.kill)
        assert [process.stdout.readline() for process in processes] == ["missing\n"] * 4
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        found = [process.communicate(timeout=30)[0] for process in processes]
        assert found == [expected.hexdigest() + "\n"] * 4
    path = row_index_path(tmp_path, shard.name, **KEY)
    assert path.read_bytes() == row_index_path(alone, shard.name, **KEY).read_bytes()
    assert list(path.parent.iterdir()) == [path]

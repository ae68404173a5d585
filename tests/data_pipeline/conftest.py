"""One Ray session, one corpus and one prepared data set for all tests of the room."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.job import prepare
from data_pipeline.manifest import Manifest
from data_pipeline.workers import ray_session
from tests.data_pipeline.texts import MARKUP, prose, rows, settings


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[object]:
    with ray_session(workers=2, ray_address=None) as ray:
        yield ray


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 60 documents as .txt, .jsonl, .jsonl.gz, .jsonl.zst and .parquet, one of them markup."""
    import pyarrow
    import pyarrow.parquet
    import zstandard

    root = tmp_path_factory.mktemp("corpus")
    (root / "a").mkdir()
    for seed in range(10):
        (root / "a" / f"{seed}.txt").write_text(prose(seed))
    (root / "a" / "9.txt").write_text(MARKUP + prose(9))
    (root / "b.jsonl").write_text("".join(rows(range(10, 25))))
    (root / "c.jsonl.gz").write_bytes(gzip.compress("".join(rows(range(25, 40))).encode()))
    (root / "d.jsonl.zst").write_bytes(zstandard.compress("".join(rows(range(40, 50))).encode()))
    table = pyarrow.table({"text": [prose(seed) for seed in range(50, 60)]})
    pyarrow.parquet.write_table(table, root / "e.parquet", row_group_size=4)
    return root


@pytest.fixture(scope="session")
def prepared(
    ray_cluster: object, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Manifest]:
    directory = tmp_path_factory.mktemp("prepared")
    manifest = prepare(settings(directory, corpus), workers=2, progress=False)
    return directory, manifest

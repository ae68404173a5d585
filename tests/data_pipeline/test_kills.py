"""SIGKILL at random moments, full disks and lost sources on real books: the same bytes come out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.data.kills import kill_until_done, output_hashes
from data_pipeline.config import (
    DataConfig,
    DecontaminateConfig,
    DedupConfig,
    FilterConfig,
    SourceConfig,
    TokenizerConfig,
)
from data_pipeline.job import prepare
from tests.data_pipeline.test_dedup import changed
from tests.data_pipeline.texts import prose

BOOKS = Path(__file__).resolve().parents[3] / "shared/data/books"
BUDGET = 450_000
PLANTED = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"


def book_texts() -> list[str]:
    """A few books; where they are not there, made-up ones, of which the second does not fit the budget."""
    paths = sorted(BOOKS.glob("*.txt"), key=lambda path: path.stat().st_size)[:3]
    return [path.read_text(errors="replace") for path in paths] or [prose(n, 250_000) for n in range(3)]


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Books in documents of 8 kB, two of them planted again, one nearly so, and one evaluation n-gram.

    Two books have a budget, which ends inside the second: so rounds are repeated.
    """
    place = tmp_path_factory.mktemp("books")
    root = place / "text"
    for number, text in enumerate(book_texts()):
        folder = root / ("first" if number < 2 else "second")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.txt").write_text(text)
    middle = (root / "first" / "1.txt").read_text()[300_000:306_000]
    planted = [middle, middle, changed(middle, 0.04, 1), prose(1) + PLANTED + prose(2)]
    (root / "second" / "planted.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in planted)
    )
    evaluation = place / "set.json"
    evaluation.write_text(json.dumps([{"question": PLANTED}]))
    return DataConfig(
        directory=str(place / "straight"),
        unit_bytes=128 * 1024,
        sequence_length=256,
        packing="best_fit",
        shard_tokens=300_000,
        test_fraction=0.02,
        mixture={
            name: SourceConfig(
                kind="path",
                path=str(root / name),
                strip_gutenberg=True,
                text_document_bytes=8192,
                licence="public domain",
                max_tokens=BUDGET if name == "first" else None,
            )
            for name in ("first", "second")
        },
        filters=FilterConfig(min_words=20, max_duplicate_lines=0.5),
        dedup=DedupConfig(similarity=0.8),
        decontaminate=DecontaminateConfig(paths=(str(evaluation),)),
        tokenizer=TokenizerConfig(vocab_size=2000, sample_bytes=2**20),
    )


@pytest.fixture(scope="module")
def straight(books: DataConfig, ray_cluster: object) -> dict[str, str]:
    """Hashes of an undisturbed run."""
    made = prepare(books, workers=2, progress=False)
    taken = sum(sums["tokens"] for label, sums in made.sources.items() if label.startswith("first/"))
    assert BUDGET <= taken < 1.2 * BUDGET
    steps = made.stages["second"]
    assert steps["evaluation text"]["documents"] == 1
    assert steps["exact duplicates"]["documents"] == 1
    assert steps["near duplicates"]["documents"] == 1
    return output_hashes(Path(books.directory))


@pytest.mark.timeout(600)
def test_twenty_kills_change_nothing(
    books: DataConfig, straight: dict[str, str], tmp_path: Path, ray_cluster
) -> None:
    address = ray_cluster.get_runtime_context().gcs_address
    done = kill_until_done(books, tmp_path, kills=20, address=address, seed=7)
    assert done.count == 20
    assert min(done.drivers, done.workers) >= 3
    folders = [path for path in tmp_path.iterdir() if path.is_dir()]
    for folder in folders:
        assert output_hashes(folder) == straight


@pytest.mark.parametrize("workers", [1, 4])
def test_the_number_of_workers_changes_nothing(
    books: DataConfig, straight: dict[str, str], tmp_path: Path, ray_cluster: object, workers: int
) -> None:
    prepare(replace(books, directory=str(tmp_path)), workers=workers, progress=False)
    assert output_hashes(tmp_path) == straight

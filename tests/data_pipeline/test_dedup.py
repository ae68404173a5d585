from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline import dedup
from data_pipeline.clean import clean_unit
from data_pipeline.commit import clear_attempts, unit_folder
from data_pipeline.config import DedupConfig
from data_pipeline.dedup import Partition, dropped_positions, read_pairs, run_partition, write_copies
from tests.data_pipeline.test_clean import of_lines, sealed, stage_of
from tests.data_pipeline.texts import prose
from trellis_dist.files import digest, write_json

NEAR = DedupConfig(similarity=0.8)
Ids = set[tuple[int, int]]


def clean(work: Path, texts: list[str], config: DedupConfig) -> str:
    """Key of one clean unit that holds these documents."""
    source = of_lines(work / f"{digest(texts)[:16]}.jsonl", texts)
    (unit,) = sealed(source)
    stage = stage_of(source, dedup=config)
    clean_unit(unit, stage, stage.key(unit), str(work))
    return stage.key(unit)


def copies(
    work: Path,
    keys: list[str],
    config: DedupConfig,
    *,
    count: int = 1,
    reach: list[int] | None = None,
    sources: Sequence[int] | None = None,
) -> dict[str, np.ndarray]:
    """Pairs of the exact and the near stage over these units, by default of one source."""
    sources = sources or [0] * len(keys)
    searched = list(zip(keys, sources, reach or [10**6] * len(keys), strict=True))
    plan = work / "plans" / f"{digest(searched)}.json"
    write_json(plan, searched)
    exact = run_all(work, [Partition("exact", str(plan), i, count) for i in range(count)])
    own = (write_copies(exact, work / "plans"), config.permutations, config.bands, config.similarity)
    near = run_all(work, [Partition("near", str(plan), i, count, *own) for i in range(count)])
    return {"exact": exact, "near": near}


def run_all(work: Path, parts: list[Partition]) -> np.ndarray:
    for part in parts:
        run_partition(part, str(work))
    return read_pairs(folders(work, parts))


def folders(work: Path, parts: list[Partition]) -> list[Path]:
    return [unit_folder(work, part.kind, part.key) for part in parts]


def pairs(found: np.ndarray) -> set[tuple[tuple[int, int], tuple[int, int]]]:
    """((unit, position) dropped, (unit, position) kept)."""

    def place(value: int) -> tuple[int, int]:
        return value >> 32, value & 0xFFFFFFFF

    return {(place(int(pair["dropped"])), place(int(pair["kept"]))) for pair in found}


def changed(text: str, share: float, seed: int) -> str:
    """The text with this share of its words replaced, in one passage."""
    draw = random.Random(seed)
    words = text.split(" ")
    count = round(share * len(words))
    start = draw.randrange(len(words) - count)
    return " ".join([*words[:start], *(f"x{draw.random()}" for _ in range(count)), *words[start + count :]])


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dedup") / "work"
    clear_attempts(folder)
    return folder


def test_planted_copies_are_found_and_clean_text_is_not(work: Path) -> None:
    texts = [prose(seed, words=600) for seed in range(40)]
    planted = [*texts, texts[7], changed(texts[3], 0.025, 1), texts[7], changed(texts[11], 0.025, 2)]
    keys = [clean(work, texts[:20], NEAR), clean(work, planted[20:], NEAR)]
    found = copies(work, keys, NEAR)
    assert pairs(found["exact"]) == {((1, 20), (0, 7)), ((1, 22), (0, 7))}
    assert pairs(found["near"]) == {((1, 21), (0, 3)), ((1, 23), (0, 11))}
    assert (found["near"]["similarity"] > 0.8).all()
    assert dropped_positions(found["near"], 1).tolist() == [21, 23]
    assert dropped_positions(found["near"], 0).tolist() == []


@pytest.mark.parametrize("count", [2, 5, 64])
def test_partitions_of_any_number_find_the_same(work: Path, count: int) -> None:
    texts = [prose(seed % 15, words=400) for seed in range(30)]
    texts += [changed(texts[seed], 0.03, seed) for seed in range(10)]
    keys = [clean(work, texts[:17], NEAR), clean(work, texts[17:], NEAR)]
    one, several = (copies(work, keys, NEAR, count=number) for number in (1, count))
    assert pairs(one["exact"]) == pairs(several["exact"])
    assert len(one["exact"]) == 15
    assert pairs(one["near"]) == pairs(several["near"])
    assert len(one["near"]) == 10


def test_what_is_similar_in_a_band_only_is_kept(work: Path) -> None:
    """Half of the text shared: some share a bucket, none is 0.8 similar."""
    base = prose(1, words=4000)
    texts = [base + prose(seed, words=3000) for seed in range(2, 60)]
    loose = DedupConfig(similarity=0.8, permutations=128, bands=64)
    found = copies(work, [clean(work, texts, loose)], loose)
    assert len(found["near"]) == 0
    lower = DedupConfig(similarity=0.3, permutations=128, bands=64)
    assert len(copies(work, [clean(work, texts, lower)], lower)["near"]) == len(texts) - 1


def test_a_bucket_of_others_does_not_hide_a_copy(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one band of one value, many documents share a bucket; each copy is still compared with its own."""
    texts = [prose(seed, words=300) for seed in range(12)]
    planted = texts + [changed(text, 0.05, 9) for text in texts]
    crude = DedupConfig(similarity=0.7, permutations=128, bands=128)
    found = copies(work, [clean(work, planted, crude)], crude)
    assert pairs(found["near"]) == {((0, 12 + n), (0, n)) for n in range(12)}


def test_what_is_out_of_reach_takes_no_place_in_a_bucket(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As above, over two sources of two units: the first reaches two of twelve, all in one bucket."""
    monkeypatch.setattr(dedup, "HEADS", 16)
    texts = [prose(seed, words=300) for seed in range(24)]
    first = [*texts[:12], changed(texts[5], 0.05, 9)]
    second = [*texts[12:], *(changed(text, 0.05, 9) for text in [*texts[12:], texts[0], texts[5], texts[5]])]
    crude = DedupConfig(similarity=0.7, permutations=128, bands=128)
    keys = [clean(work, part, crude) for part in (first[:6], first[6:], second[:12], second[12:])]
    found = copies(work, keys, crude, reach=[2, 0, 12, 15], sources=[0, 0, 1, 1])
    # Its own copy out of reach, the second's own, and the copies of what is in reach, or came first.
    expected = {((1, 6), (0, 5)), ((3, 12), (0, 0)), ((3, 14), (3, 13))}
    assert pairs(found["near"]) | pairs(found["exact"]) == expected | {((3, n), (2, n)) for n in range(12)}


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seeds=st.lists(st.integers(0, 12), min_size=2, max_size=24), cut=st.integers(1, 23))
def test_more_text_at_the_end_changes_nothing_before(work: Path, seeds: list[int], cut: int) -> None:
    texts = [
        prose(seed, words=120) if n % 2 else changed(prose(seed, 120), 0.04, n)
        for n, seed in enumerate(seeds)
    ]
    cut = min(cut, len(texts) - 1)
    first, second = clean(work, texts[:cut], NEAR), clean(work, texts[cut:], NEAR)
    alone, both = copies(work, [first], NEAR), copies(work, [first, second], NEAR)
    for kind in ("exact", "near"):
        assert pairs(alone[kind]) == {pair for pair in pairs(both[kind]) if pair[0][0] == 0}
        assert all(kept < dropped for dropped, kept in pairs(both[kind]))


def test_what_a_budget_does_not_reach_is_the_original_of_nothing(work: Path) -> None:
    """Of three copies over two units the first is out of reach: the second is the original of the third."""
    texts = [prose(seed) for seed in range(4)]
    first = clean(work, [*texts, texts[3]], NEAR)
    second = clean(work, [texts[1], texts[3], changed(texts[3], 0.01, 1), texts[3]], NEAR)
    found = copies(work, [first, second], NEAR, reach=[3, 4], sources=[0, 1])
    # Beyond its reach a source still counts its own copies.
    assert pairs(found["exact"]) == {((0, 4), (0, 3)), ((1, 0), (0, 1)), ((1, 3), (1, 1))}
    assert pairs(found["near"]) == {((1, 2), (1, 1))}
    whole = copies(work, [first, second], NEAR, reach=[5, 4], sources=[0, 1])
    others = {((1, 0), (0, 1)), ((1, 1), (0, 3)), ((1, 3), (0, 3))}
    assert pairs(whole["exact"]) == {((0, 4), (0, 3))} | others


def test_a_partition_reads_its_range_and_holds_no_more(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dedup, "PARTITION_RECORDS", 1000)
    assert [dedup.partitions(count) for count in (0, 1, 1000, 1001, 16_000)] == [1, 1, 1, 2, 16]
    keys = [clean(work, [prose(seed, words=50) for seed in range(300)], NEAR)]
    plan = work / "plans" / f"{digest(keys)}.json"
    write_json(plan, [(key, 0, 300) for key in keys])
    units = [dedup.Searched(unit_folder(work, "clean", key), 0, 300) for key in keys]
    found = [
        dedup._gather(Partition("near", str(plan), i, 8), units, "bands", dedup.BAND, "key")[0]
        for i in range(8)
    ]
    assert sum(map(len, found)) == 300 * NEAR.bands
    assert max(map(len, found)) < 300 * NEAR.bands / 5
    for index, part in enumerate(found):
        assert (part["key"] >> np.uint64(61) == index).all()


def test_a_copy_that_many_bands_find_is_one_pair(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dedup, "TOGETHER", 3)
    texts = [prose(seed, words=400) for seed in range(6)]
    planted = texts + [changed(text, 0.02, 1) for text in texts]
    found = copies(work, [clean(work, planted, NEAR)], NEAR, count=16)
    assert pairs(found["near"]) == {((0, 6 + n), (0, n)) for n in range(6)}
    assert len(found["near"]) == 6

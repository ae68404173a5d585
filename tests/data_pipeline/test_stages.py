"""All stages together: planted copies, evaluation text, filters, mixtures, budgets, splits."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from data_pipeline import job, pipeline, vocabulary
from data_pipeline.config import (
    DataConfig,
    DecontaminateConfig,
    DedupConfig,
    FilterConfig,
    SourceConfig,
    TokenizerConfig,
)
from data_pipeline.job import prepare
from data_pipeline.manifest import Manifest, verify_dataset
from data_pipeline.merge import Plan
from data_pipeline.stages import Lead
from tests.data_pipeline.test_dedup import changed
from tests.data_pipeline.test_job import committed, documents
from tests.data_pipeline.texts import hashes, prose, settings

QUESTION = " ".join(f"question{n}" for n in range(16))


def written(path: Path, texts: list[str]) -> SourceConfig:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return SourceConfig(kind="path", path=str(path))


def every_stage(root: Path, directory: Path) -> DataConfig:
    """A mixture of two sources with everything planted."""
    books = [prose(seed, words=500) for seed in range(40)]
    web = [prose(seed, words=500) for seed in range(100, 140)]
    dirty = prose(7, 200) + QUESTION + prose(8, 200)
    sources = {
        "web": written(root / "web.jsonl", [*web, books[3], changed(books[5], 0.04, 1), "too short", web[2]]),
        "books": written(root / "books.jsonl", [*books, dirty, books[0]]),
    }
    (root / "eval.jsonl").write_text(json.dumps({"question": QUESTION}) + "\n")
    return settings(
        directory,
        root,
        mixture=sources,
        filters=FilterConfig(min_words=10),
        dedup=DedupConfig(similarity=0.8),
        decontaminate=DecontaminateConfig(paths=(str(root / "eval.jsonl"),)),
        test_fraction=0.1,
        shard_tokens=20_000,
        packing="best_fit",
    )


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory, ray_cluster: object) -> tuple[DataConfig, Manifest]:
    root = tmp_path_factory.mktemp("stages")
    config = every_stage(root / "text", root / "out")
    return config, prepare(config, workers=2, progress=False)


def test_everything_planted_is_found_and_nothing_else(full: tuple[DataConfig, Manifest]) -> None:
    config, made = full
    directory = Path(config.directory)
    found = [text for split in made.splits for text in documents(directory, split)]
    assert sorted(found) == sorted(prose(seed, words=500) for seed in [*range(40), *range(100, 140)])
    books, web = made.stages["books"], made.stages["web"]
    assert [books[step]["documents"] for step in ("read", "kept", "exact duplicates")] == [42, 42, 1]
    assert books["evaluation text"]["documents"] == 1
    assert books["near duplicates"]["documents"] == 0
    assert [web[step]["documents"] for step in ("read", "filter: min_words", "kept")] == [44, 1, 43]
    # books comes before web in the alphabet, so its copies are the ones that are kept.
    assert [web[step]["documents"] for step in ("exact duplicates", "near duplicates")] == [2, 1]
    assert [source["left"]["documents"] for source in (books, web)] == [40, 40]
    assert {name: sums["documents"] for name, sums in made.sources.items()} == {
        "books/jsonl": 40,
        "web/jsonl": 40,
    }
    (hit,) = [json.loads(line) for line in (directory / "contamination.jsonl").read_text().splitlines()]
    assert hit["evaluation"].startswith("eval.jsonl:1")
    assert (hit["corpus"], hit["ngram"] in QUESTION) == ("books", True)
    copies = [json.loads(line) for line in (directory / "duplicates.jsonl").read_text().splitlines()]
    ends = [[pair[which]["corpus"] for which in ("dropped", "original")] for pair in copies]
    assert sorted(ends) == [["books", "books"], ["web", "books"], ["web", "books"], ["web", "web"]]
    assert {pair["original"]["input"].partition(" ")[0] for pair in copies} == {"books.jsonl", "web.jsonl"}
    assert verify_dataset(directory) == []


def test_splits_are_disjoint_and_chosen_by_hash(full: tuple[DataConfig, Manifest]) -> None:
    config, made = full
    found = {name: set(documents(Path(config.directory), name)) for name in made.splits}
    assert set(found) == {"train", "validation", "test"}
    assert all(found.values())
    assert sum(map(len, found.values())) == len(set().union(*found.values())) == 80


def test_shards_are_of_one_source_and_named_after_it(full: tuple[DataConfig, Manifest]) -> None:
    config, made = full
    shards = [shard for split in made.splits.values() for shard in split.shards]
    assert {shard.source for shard in shards} == {"books", "web"}
    assert all(f"-{shard.source}-" in shard.name and shard.tokens <= 20_000 for shard in shards)
    assert len(made.splits["train"].shards) > 4
    rows = sorted((Path(config.directory) / "index").iterdir())
    assert len(rows) == len(shards)


def test_any_number_of_workers_makes_the_same_bytes(
    full: tuple[DataConfig, Manifest], tmp_path: Path, ray_cluster: object
) -> None:
    again = prepare(replace(full[0], directory=str(tmp_path)), workers=1, progress=False)
    assert replace(again, seconds={}) == replace(full[1], seconds={})
    assert hashes(tmp_path) == hashes(Path(full[0].directory))


def test_a_changed_stage_re_uses_those_before_it(
    full: tuple[DataConfig, Manifest],
    tmp_path: Path,
    ray_cluster: object,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(full[0].directory, tmp_path / "copy")

    def refuse(*_: object) -> None:
        raise AssertionError("the text was cleaned again")

    monkeypatch.setattr(pipeline, "clean_unit", refuse)
    config = replace(full[0], directory=str(tmp_path / "copy"), dedup=DedupConfig(similarity=0.99))
    made = prepare(config, workers=2, progress=False)
    assert made.stages["web"]["near duplicates"]["documents"] == 0
    assert made.fingerprint != full[1].fingerprint


def fails_at(function: Callable[..., object], marks: Path, number: int, fail: Callable[[], None]) -> object:
    """The function, but its call of that number over all workers fails, and so do all after it."""
    marks.mkdir(exist_ok=True)

    def made(*arguments: object) -> object:
        (marks / os.urandom(8).hex()).touch()
        if len(list(marks.iterdir())) >= number:
            fail()
        return function(*arguments)

    return made


def disk_full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/full")


@pytest.mark.parametrize(
    ("module", "name", "number"),
    [
        (pipeline, "clean_unit", 3),
        (pipeline, "run_partition", 2),
        (pipeline, "token_unit", 4),
        (job, "write_planned", 2),
        (job, "write_report", 1),
        (vocabulary, "train_tokenizer", 1),
        (job, "_publish", 1),
        (job, "write_manifest", 1),
    ],
)
def test_a_disk_that_fills_up_costs_nothing_that_is_committed(
    full: tuple[DataConfig, Manifest],
    tmp_path: Path,
    ray_cluster: object,
    monkeypatch: pytest.MonkeyPatch,
    module: ModuleType,
    name: str,
    number: int,
) -> None:
    config = replace(full[0], directory=str(tmp_path / "out"))
    with monkeypatch.context() as patch:
        failing = fails_at(getattr(module, name), tmp_path / "marks", number, disk_full)
        patch.setattr(module, name, failing)
        with pytest.raises(OSError, match="No space left on device") as error:
            prepare(config, workers=2, progress=False)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out" / "manifest.json").exists()
    units = committed(tmp_path / "out")
    made = prepare(config, workers=2, progress=False)
    assert made.fingerprint == full[1].fingerprint
    assert hashes(tmp_path / "out") == hashes(Path(full[0].directory))
    assert units <= committed(tmp_path / "out")


def test_a_source_that_vanishes_midway_is_named_and_continues_when_it_is_back(
    full: tuple[DataConfig, Manifest], tmp_path: Path, ray_cluster: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, away = tmp_path / "text", tmp_path / "away"
    config = every_stage(text, tmp_path / "out")
    lost = Path(config.mixture["web"].path or "")

    def vanish() -> None:
        if lost.exists():
            lost.rename(away)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "clean_unit", fails_at(pipeline.clean_unit, tmp_path / "marks", 8, vanish))
        with pytest.raises(OSError, match=r"web\.jsonl"):
            prepare(config, workers=1, progress=False)
    units = committed(tmp_path / "out")
    assert units
    with pytest.raises(ValueError, match=r"web\.jsonl' does not exist"):
        prepare(config, workers=1, progress=False)
    away.rename(lost)
    prepare(config, workers=2, progress=False)
    assert units <= committed(tmp_path / "out")
    ours, theirs = hashes(tmp_path / "out"), hashes(Path(full[0].directory))
    for made in (ours, theirs):
        del made["manifest.json"]  # it names the folder the text was in
    assert ours == theirs


@pytest.mark.parametrize("budget", [1500, 9000])
def test_a_token_budget_takes_the_first_documents_and_more_of_the_corpus_changes_nothing(
    tmp_path: Path, ray_cluster: object, budget: int, corpus: Path, prepared: tuple[Path, Manifest]
) -> None:
    model = TokenizerConfig(path=str(prepared[0] / "tokenizer.model"))
    texts = [prose(seed) for seed in range(60)]
    texts[1] = texts[0]
    found = []
    for count in (40, 60):
        source = replace(written(tmp_path / f"{count}.jsonl", texts[:count]), max_tokens=budget)
        config = settings(tmp_path / str(count), tmp_path, source=source, tokenizer=model)
        made = prepare(config, workers=2, progress=False)
        train = made.splits["train"]
        assert budget <= train.tokens < budget + 1200
        taken = documents(tmp_path / str(count), "train") + documents(tmp_path / str(count), "validation")
        assert set(taken) == set(texts[: len(taken) + 1])
        found.append(taken)
    assert found[0] == found[1]


def test_a_budget_that_its_first_guess_does_not_fill_opens_more(
    tmp_path: Path, ray_cluster: object, prepared: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "BYTES_PER_TOKEN", 0.5)
    model = TokenizerConfig(path=str(prepared[0] / "tokenizer.model"))
    source = replace(written(tmp_path / "a.jsonl", [prose(seed) for seed in range(60)]), max_tokens=9000)
    config = settings(tmp_path / "out", tmp_path, source=source, tokenizer=model)
    made = prepare(config, workers=2, progress=False)
    assert 9000 <= made.splits["train"].tokens < 10_200
    cleaned = len(list((tmp_path / "out" / "work" / "clean").iterdir()))
    assert cleaned < 60 * 2200 // 8192


def test_a_budget_larger_than_the_corpus_takes_all(
    tmp_path: Path, ray_cluster: object, prepared: tuple[Path, Manifest]
) -> None:
    model = TokenizerConfig(path=str(prepared[0] / "tokenizer.model"))
    texts = [prose(seed) for seed in range(20)]
    source = replace(written(tmp_path / "a.jsonl", texts), max_tokens=10**9, max_documents=10**6)
    config = settings(tmp_path / "out", tmp_path, source=source, tokenizer=model)
    made = prepare(config, workers=2, progress=False)
    assert sum(split.documents for split in made.splits.values()) == 20


def test_filters_that_drop_everything_are_named(tmp_path: Path, ray_cluster: object) -> None:
    source = written(tmp_path / "a.jsonl", [prose(seed) for seed in range(4)])
    config = settings(tmp_path / "out", tmp_path, source=source, filters=FilterConfig(min_words=10**6))
    with pytest.raises(ValueError, match=r"filter: min_words dropped 4 of 4: loosen data\.filters"):
        prepare(config, workers=1, progress=False)


def test_a_lead_counts_only_what_follows_from_the_first() -> None:
    lead = Lead({"tokens": 10}, lambda entry: entry)
    for index in (2, 1):
        lead.put(index, {"tokens": 4})
    assert (lead.count, lead.full) == (0, False)
    lead.put(0, {"tokens": 4})
    assert (lead.count, lead.full, lead.sums) == (3, True, {"tokens": 12})
    lead.put(3, {"tokens": 4})
    assert lead.count == 3
    lead.raise_limits({"tokens": 13})
    assert (lead.count, lead.full) == (4, True)


@pytest.mark.parametrize("limits", [{"max_tokens": 3000}, {"max_documents": 4}])
def test_a_small_budget_holds_one_out_of_what_it_takes(
    tmp_path: Path, ray_cluster: object, prepared: tuple[Path, Manifest], limits: dict[str, int]
) -> None:
    model = TokenizerConfig(path=str(prepared[0] / "tokenizer.model"))
    source = replace(written(tmp_path / "a.jsonl", [prose(seed) for seed in range(60)]), **limits)
    config = settings(tmp_path / "out", tmp_path, source=source, tokenizer=model, validation_fraction=0.001)
    made = prepare(config, workers=2, progress=False)
    assert made.splits["validation"].documents == 1


def test_a_first_unit_of_copies_leaves_enough_to_hold_out(
    tmp_path: Path, ray_cluster: object, prepared: tuple[Path, Manifest]
) -> None:
    model = TokenizerConfig(path=str(prepared[0] / "tokenizer.model"))
    (tmp_path / "text").mkdir()
    written(tmp_path / "text" / "a.jsonl", [prose(1)] * 12)
    written(tmp_path / "text" / "b.jsonl", [prose(seed, words=40) for seed in range(200)])
    source = SourceConfig(kind="path", path=str(tmp_path / "text"), max_tokens=15_000)
    config = settings(tmp_path / "out", tmp_path, source=source, tokenizer=model, unit_bytes=30_000)
    made = prepare(config, workers=2, progress=False)
    assert made.splits["validation"].documents > 3
    assert made.splits["train"].tokens >= 15_000


@pytest.mark.parametrize("draw", range(3))
def test_what_is_held_out_is_in_the_data_set_though_copies_come_back(
    tmp_path: Path, ray_cluster: object, prepared: tuple[Path, Manifest], draw: int
) -> None:
    """Documents of b that are copies of what a opened and left come first in the end, and fill its budget."""
    model = TokenizerConfig(path=str(prepared[0] / "tokenizer.model"))
    a, b = ([prose(1000 * draw + 100 * number + seed, words=40) for seed in range(30)] for number in range(2))
    mixture = {
        "a": replace(written(tmp_path / "a" / "x.jsonl", a), max_documents=3),
        "b": replace(written(tmp_path / "b" / "x.jsonl", [*a[10:20], *b]), max_documents=3),
    }
    config = settings(tmp_path / "out", tmp_path, mixture=mixture, tokenizer=model, validation_fraction=0.001)
    made = prepare(config, workers=2, progress=False)
    found = {name: split.documents for name, split in made.splits.items()}
    assert sum(found.values()) == 6
    assert min(found["validation"], found["train"]) >= 1


@pytest.mark.parametrize("budgets", [(2, None), (1, 1)])
def test_budgets_of_a_document_or_two_hold_one_out(
    tmp_path: Path, ray_cluster: object, prepared: tuple[Path, Manifest], budgets: tuple[int, int | None]
) -> None:
    model = TokenizerConfig(path=str(prepared[0] / "tokenizer.model"))
    for draw in range(3):
        mixture = {
            str(name): replace(
                written(
                    tmp_path / f"{draw}{name}" / "x.jsonl",
                    [prose(ord(name) + draw + 90 * n) for n in range(5)],
                ),
                max_documents=budget,
            )
            for name, budget in zip("ab", budgets)
            if budget
        }
        folder = tmp_path / f"out{draw}"
        config = settings(folder, tmp_path, mixture=mixture, tokenizer=model, validation_fraction=1e-6)
        made = prepare(config, workers=2, progress=False)
        assert made.splits["validation"].documents == 1
        assert made.splits["train"].documents == 1


def test_two_sources_may_hold_the_same_file(tmp_path: Path, ray_cluster: object) -> None:
    """Equal names and bytes give equal units: one copy of each document is kept, the first."""
    texts = [prose(seed) for seed in range(20)]
    sources = {name: written(tmp_path / name / "same.jsonl", texts) for name in ("first", "second")}
    sources["third"] = written(tmp_path / "third" / "other.jsonl", [*texts[:5], prose(99), prose(98)])
    config = settings(tmp_path / "out", tmp_path, mixture=sources)
    made = prepare(config, workers=2, progress=False)
    found = [text for split in made.splits for text in documents(tmp_path / "out", split)]
    assert sorted(found) == sorted([*texts, prose(99), prose(98)])
    left = {name: steps["left"]["documents"] for name, steps in made.stages.items()}
    assert left == {"first": 20, "second": 0, "third": 2}


@pytest.mark.parametrize("similarity", [None, 0.8])
def test_a_copy_is_one_of_what_the_budgets_before_it_take(
    tmp_path: Path, ray_cluster: object, similarity: float | None, prepared: tuple[Path, Manifest]
) -> None:
    """Each source opens more documents than it takes; what it leaves, a later one may hold."""
    a, b, c = ([prose(100 * number + seed) for seed in range(14)] for number in range(3))
    near = changed(a[10], 0.01, 1)
    sources = {
        "a": (a, 10),
        "b": ([a[3], a[10], b[0], a[10], near, *b[1:8], a[11], b[8]], 7),
        "c": ([b[2], a[10], b[7], c[0], b[8], a[11], b[7], *c[1:4]], None),
    }
    taken: list[str] = []
    for texts, budget in sources.values():
        own: list[str] = []
        for text in texts:
            copy = text in taken or text in own or (similarity is not None and text == near)
            if not copy and len(own) < (budget or 99):
                own.append(text)
        taken += own
    assert {a[10], b[7], b[8], a[11]} <= set(taken), "each was opened before a budget ended"
    mixture = {
        name: replace(written(tmp_path / name / "x.jsonl", texts), max_documents=budget)
        for name, (texts, budget) in sources.items()
    }
    model = TokenizerConfig(path=str(prepared[0] / "tokenizer.model"))
    near_copies = DedupConfig(similarity=similarity)
    config = settings(tmp_path / "out", tmp_path, mixture=mixture, tokenizer=model, dedup=near_copies)
    made = prepare(config, workers=2, progress=False)
    found = [text for split in made.splits for text in documents(tmp_path / "out", split)]
    assert sorted(found) == sorted(taken)
    again = replace(config, directory=str(tmp_path / "again"))
    assert prepare(again, workers=1, progress=False).fingerprint == made.fingerprint


def test_a_run_that_fails_leaves_the_finished_data_set_as_it_was(
    full: tuple[DataConfig, Manifest], tmp_path: Path, ray_cluster: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(full[0].directory, directory)
    files = {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
    other = replace(full[0], directory=str(directory), tokenizer=TokenizerConfig(vocab_size=500, threads=1))
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "token_unit", fails_at(pipeline.token_unit, tmp_path / "marks", 2, disk_full))
        with pytest.raises(OSError, match="No space left"):
            prepare(other, workers=1, progress=False)
    gone = {"web": replace(full[0].mixture["web"], path=str(tmp_path / "nowhere"))}
    moved = replace(other, mixture=dict(full[0].mixture) | gone)
    with pytest.raises(ValueError, match="nowhere"):
        prepare(moved, workers=1, progress=False)
    assert files == {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
    assert verify_dataset(directory) == []
    changed_set = prepare(other, workers=1, progress=False)
    assert changed_set.tokenizer["vocab_size"] == 500
    assert verify_dataset(directory) == []


def test_what_a_killed_worker_began_to_write_does_not_stay(
    full: tuple[DataConfig, Manifest], tmp_path: Path, ray_cluster: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run goes on with another worker, so nobody comes after it to clear up."""
    write = job.write_planned

    def dies_once(plan: Plan, directory: str) -> object:
        litter = Path(directory) / f".{plan.name}.bin.1-0123abcd.tmp"
        if not list(Path(directory).glob(".*.tmp")):
            litter.write_bytes(b"half a shard")
            os.kill(os.getpid(), signal.SIGKILL)
        return write(plan, directory)

    monkeypatch.setattr(job, "write_planned", dies_once)
    prepare(replace(full[0], directory=str(tmp_path)), workers=1, progress=False)
    assert hashes(tmp_path) == hashes(Path(full[0].directory))

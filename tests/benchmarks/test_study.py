"""The study: its books, paired seeds, what it scores, associative recall."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.hand_made import write_documents
from benchmarks.study import books, expected, known, places, plan, reach, recall, results, score
from data_pipeline.config import TokenizerConfig
from data_pipeline.loader import BatchLoader, TokenDataset
from data_pipeline.tokenizer import Tokenizer, train_tokenizer
from evals.scorer import Scorer
from trellis_dist.models.baseline_config import BaselineConfig
from trellis_dist.models.config import ModelConfig, TrellisConfig
from trellis_dist.models.counts import parameter_counts
from trellis_dist.models.language_model import build_language_model

NOVELS = Path(__file__).resolve().parents[3] / "shared/data/books"


# Books

RAW = (
    "\ufeffThe Project Gutenberg EBook\r\n*** START OF THIS PROJECT GUTENBERG EBOOK X ***\r\n\r\n"
    "Produced by Somebody\r\nand another\r\n\r\nX\r\n\r\nIt began.\r\n\r\nIt ended.\r\n\r\n"
    "End of the Project Gutenberg EBook of X, by Y\r\n\r\n"
    "*** END OF THIS PROJECT GUTENBERG EBOOK X ***\r\nLicence"
)


def test_a_book_is_what_lies_between_the_marks_without_the_editions_own_lines() -> None:
    assert books.stripped(RAW) == "X\n\nIt began.\n\nIt ended.\n"
    with pytest.raises(ValueError, match="marks of Project Gutenberg"):
        books.stripped("A text")


def test_splits_are_by_book_and_name_ten_of_them() -> None:
    found = [book for split in books.SPLITS for book in books.find_books(split)]
    assert len({book.file for book in found}) == len({book.sha256 for book in found}) == len(found) == 10
    assert [len(books.find_books(split)) for split in books.SPLITS] == [5, 2, 3]


def test_the_novels_are_those_of_the_table_and_hold_nothing_of_the_edition() -> None:
    """Of the ten novels where they are; otherwise of a made-up one, and the table is not looked at."""
    found = [book for split in books.SPLITS for book in books.find_books(split)]
    texts = [book.read(NOVELS) for book in found] if NOVELS.is_dir() else [books.stripped(RAW)]
    for text in texts:
        ends = text[:500].lower() + text[-500:].lower()
        assert not any(word in ends for word in ("gutenberg", "produced by", "prepared by")), ends


def test_another_edition_is_refused_and_a_missing_file_named(tmp_path: Path) -> None:
    book = books.find_books("test")[0]
    with pytest.raises(FileNotFoundError, match=book.file):
        book.read(tmp_path)
    marked = (
        "*** START OF THIS PROJECT GUTENBERG EBOOK X ***\nX\n*** END OF THIS PROJECT GUTENBERG EBOOK X ***"
    )
    (tmp_path / book.file).write_text(marked)
    with pytest.raises(ValueError, match=f"another text of {book.name}"):
        book.read(tmp_path)


def test_parts_are_the_whole_and_begin_after_blank_lines() -> None:
    text = "\n\n".join(f"Paragraph {i} of a text." for i in range(40))
    parts = books.parts_of(text, 8)
    assert "".join(parts) == text
    assert len(parts) == 8
    assert all(part.startswith("Paragraph") for part in parts)
    assert max(map(len, parts)) < 2 * min(map(len, parts))
    with pytest.raises(ValueError, match="cannot be cut into 8 parts"):
        books.parts_of("one paragraph only", 8)


# A small data set and what is read of it


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six made-up books in FOLDER/train, and tokenizer and shards of them in FOLDER/data."""
    root = tmp_path_factory.mktemp("study")
    (root / "train").mkdir()
    draw = np.random.default_rng(0)
    words = ["".join(draw.choice(list("abcdefgh"), 4)) for _ in range(200)]
    texts = ["\n\n".join(" ".join(draw.choice(words, 12)) for _ in range(120)) for _ in range(6)]
    for number, text in enumerate(texts):
        (root / "train" / f"{number}.txt").write_text(text)
    codec = Tokenizer(train_tokenizer(TokenizerConfig(vocab_size=320), texts))
    shards = [[[codec.bos_id, *codec.encode(text), codec.eos_id] for text in texts]]
    splits = {"train": {"corpus": shards}, "validation": {"corpus": shards}}
    write_documents(root / "data", splits, vocab_size=320, bos=codec.bos_id, eos=codec.eos_id)
    (root / "data" / "tokenizer.model").write_bytes(codec.model)
    return root


def test_a_seed_fixes_the_rows_whatever_the_model_reads_them_with(small: Path) -> None:
    """Paired seeds: micro-batches of another size, as of another model, hold the same rows in order."""

    def rows(seed: int, micro: int) -> torch.Tensor:
        data = TokenDataset(small / "data", "train", sequence_length=64, seed=seed)
        loader = BatchLoader(data, global_batch=8, micro_batch=micro)
        return torch.cat([batch.tokens for step in range(5) for batch in loader.micro_batches(8 * step)])

    assert torch.equal(rows(1, 4), rows(1, 8))
    assert not torch.equal(rows(1, 4), rows(2, 4))


def test_the_committed_results_are_of_the_plans_runs() -> None:
    found = results.Store().runs()
    known.check_results(found)
    assert not {task.name for task in expected.rehearsed(found)} & set(found)


def test_the_base_names_every_key_of_the_model() -> None:
    """A later default would change what a name means."""
    written = tomllib.loads(books.BASE.read_text())["model"]
    for section in ("trellis", "baselines"):
        kind = {"trellis": TrellisConfig, "baselines": BaselineConfig}[section]
        fields = dataclasses.fields(kind)
        assert set(written[section]) == {field.name for field in fields if field.default is not None}


def test_models_are_equally_large() -> None:
    wanted = parameter_counts(
        plan.Task("x", "tune", plan.Settings("trellis-paper", 1e-3), tokens=10**6)
        .spec(Path("w"))
        .resolved.model
    )
    for name in [name for name in plan.models() if plan.registered(name)] + list(plan.plan()["variants"]):
        settings = plan.Settings(name, 1e-3, plan.table(name))
        spec = plan.Task("x", "tune", settings, tokens=10**6).spec(Path("w"))
        found = parameter_counts(spec.resolved.model).total
        assert abs(found / wanted.total - 1) <= 0.02, name


def test_models_of_a_seed_begin_with_equal_weights_where_they_have_equal_ones() -> None:
    settings = [plan.Settings(name, 1e-3, plan.table(name)) for name in ("trellis-paper", "attention")]
    configs = [plan.Task("x", "tune", s, tokens=10**6).spec(Path("w")).resolved.model for s in settings]
    one, other = (build_language_model(config, seed=3).state_dict() for config in configs)
    shared = [name for name in one if name in other and one[name].shape == other[name].shape]
    assert "embedding_weight" in shared
    assert all(torch.equal(one[name], other[name]) for name in shared)


def test_every_model_of_a_seed_is_given_that_seeds_rows_and_initial_weights(tmp_path: Path) -> None:
    for name in ("trellis-corrected", "attention"):
        settings = plan.Settings(name, 1e-3, plan.table(name))
        recipe = plan.Task("x", "full", settings, seed=2, tokens=10**6).spec(tmp_path).resolved
        assert (recipe.data.seed, recipe.training.seed) == (2, 2)
        assert recipe.global_rows == 2
        assert (recipe.data.packing, recipe.data.carry_rows) == ("concat", 1)


@pytest.fixture(scope="module")
def scored(small: Path) -> tuple[Scorer, Path]:
    """A small model, and a folder with books of its own as the study's validation split."""
    trellis = TrellisConfig(slots=8, chunk_size=16)
    config = ModelConfig(vocab_size=320, num_layers=1, dim=16, num_heads=2, trellis=trellis)
    model = build_language_model(config, seed=0).eval()
    return Scorer(model, Tokenizer.load(small / "data" / "tokenizer.model")), small / "train"


def test_books_are_scored_token_by_token_by_part_and_position(
    scored: tuple[Scorer, Path], small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against logits of the plain forward pass, row by row."""
    scorer, folder = scored
    book = books.Book("One", "validation", "0.txt", "")
    monkeypatch.setattr(books.Book, "read", lambda self, folder: (folder / self.file).read_text())
    monkeypatch.setattr(score, "find_books", lambda split: [book])
    found = score.score_books(scorer, folder, "validation", length=160)["One"]
    texts = books.parts_of(book.read(folder), score.PARTS)
    assert found["bytes"] == len(book.read(folder).encode())
    assert len(found["parts"]) == score.PARTS
    for text, part in zip(texts, found["parts"], strict=True):
        expected = np.zeros((3, 2))
        ids = [scorer.tokenizer.bos_id, *scorer.tokenizer.encode(text)]
        for start in range(0, len(ids) - 1, 160):
            row = torch.tensor(ids[start : start + 161])
            with torch.no_grad():
                logits = scorer.model(row[None, :-1])[0]  # type: ignore[operator]
            nats = torch.nn.functional.cross_entropy(logits, row[1:], reduction="none")
            for position, loss in enumerate(nats.tolist()):
                expected[(position >= 64) + (position >= 128)] += loss, 1
        np.testing.assert_allclose(part, expected, rtol=1e-4, atol=2e-2)
    ngrams = score.bigram_nats(small / "data", folder, [("validation", None)])["validation"]["One"]
    assert ngrams["targets"] == sum(row[1] for part in found["parts"] for row in part)
    assert ngrams["kneser_ney"] < ngrams["unigram"] < ngrams["targets"] * math.log(320)
    both = score.totals({"One": found})
    assert both["bits_per_byte"] == pytest.approx(
        both["loss"] * both["targets"] / math.log(2) / found["bytes"]
    )


def test_two_models_are_compared_by_place_in_the_chunk(
    scored: tuple[Scorer, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the plain forward pass; whole rows only, from the second chunk of 16 on."""
    scorer, folder = scored
    other = build_language_model(scorer.model.config, seed=1).eval()
    models = {"full-trellis-s0": scorer.model, "full-trellis-stale-s0": other}
    loaded = {
        name: SimpleNamespace(model=model, tokenizer=scorer.tokenizer) for name, model in models.items()
    }
    monkeypatch.setattr(places, "load_run", lambda run, **_: loaded[run.name])
    monkeypatch.setattr(places, "find_books", lambda split: [books.Book("One", split, "0.txt", "")])
    monkeypatch.setattr(books.Book, "read", lambda self, folder: (folder / self.file).read_text())
    results = {name: {"about": {"length": 48, "kind": "full"}} for name in models}
    (rows,) = places.measure(results, books=folder, work=Path("w")).values()
    sums = np.zeros((8, 3))  # stale, corrected, targets
    for text in score.texts_of(books.Book("One", "validation", "0.txt", ""), folder, None):
        ids = [scorer.tokenizer.bos_id, *scorer.tokenizer.encode(text)]
        for start in range(0, len(ids) - 48, 48):
            row = torch.tensor(ids[start : start + 49])
            for column, model in enumerate((other, scorer.model)):
                with torch.no_grad():
                    logits = model(row[None, :-1])[0]
                nats = torch.nn.functional.cross_entropy(logits, row[1:], reduction="none")
                np.add.at(sums[:, column], np.arange(16, 48) % 16 // 2, nats[16:].numpy())
            np.add.at(sums[:, 2], np.arange(16, 48) % 16 // 2, 1)
    assert [row["from"] for row in rows] == list(range(0, 16, 2))
    assert [row["loss"] for row in rows] == pytest.approx(sums[:, 1] / sums[:, 2], abs=1e-3)
    apart = (sums[:, 0] - sums[:, 1]) / sums[:, 2]
    assert [row["estimate"] for row in rows] == pytest.approx(apart, abs=1e-3)
    with pytest.raises(ValueError, match="no stale run is finished"):
        places.measure({}, books=folder, work=Path("w"))


# Reach


def test_every_context_is_measured_on_the_same_targets(
    scored: tuple[Scorer, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the plain forward pass of one target at a time, with exactly the tokens that it may see."""
    scorer, _ = scored
    monkeypatch.setattr(reach, "CONTEXTS", (4, 8, 16))
    ids = [scorer.tokenizer.bos_id, *torch.randint(4, 300, (60,), generator=torch.Generator()).tolist()]
    for context in reach.CONTEXTS:
        expected = 0.0
        for place in range(16, 48):  # 60 inputs hold three times 16; the first 16 have too little before them
            start = place // context * context - context
            with torch.no_grad():
                logits = scorer.model(torch.tensor([ids[start : place + 1]]))[0, -1]  # type: ignore[operator]
            expected -= float(logits.log_softmax(-1)[ids[place + 1]])
        nats, targets = reach.nats_with(scorer, ids, context)
        assert targets == 32
        assert nats == pytest.approx(expected, rel=1e-5)
    assert reach.nats_with(scorer, ids[:17], 4) == (0.0, 0.0)


def test_a_run_is_measured_once_and_again_when_it_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(reach, "_of_run", lambda name, *_: asked.append(name) or {"contexts": []})
    results = {name: {"digest": name} for name in ("full-gsa-s0", "full-mamba2-s0", "full-mamba2-s1")}
    first = reach.measure(results, books=Path("b"), work=Path("w"))
    assert asked == ["full-gsa-s0", "full-mamba2-s0"]
    results["full-gsa-s0"] = {"digest": "trained again"}
    again = reach.measure(results, books=Path("b"), work=Path("w"), known=first)
    assert asked[2:] == ["full-gsa-s0"]
    assert {name: found["digest"] for name, found in again.items()} == {
        "full-gsa-s0": "trained again",
        "full-mamba2-s0": "full-mamba2-s0",
    }
    with pytest.raises(ValueError, match="no full run of seed 0 is finished"):
        reach.measure({}, books=Path("b"), work=Path("w"))


@pytest.mark.parametrize(
    ("pattern", "name", "lives"),
    [
        ("mamba2", "memory", 2),
        ("gated_deltanet", "memory", 2),
        ("gsa", "memory", 2 * 4),
        ("rwkv7", "memory", 16),
        ("titans", "memory", 2),
        ("trellis", "memory", 2),
        ("trellis", "value memory", 2),
        ("deltanet", "memory", 0),
    ],
)
def test_half_lives_are_those_of_the_decays_that_the_operation_gets(
    pattern: str, name: str, lives: int
) -> None:
    own = TrellisConfig(slots=4, chunk_size=4, value_gates="own", value_gate_bias=8.0)
    config = ModelConfig(
        vocab_size=32,
        num_layers=2,
        dim=16,
        num_heads=2,
        pattern=(pattern,),
        trellis=own,
        baselines=BaselineConfig(slots=4, chunk_size=4, mini_batch=4),
    )
    model = build_language_model(config, seed=0).eval()
    before = [block.mixer.operation for block in model.blocks]
    found = reach.half_lives(model, torch.arange(24).view(2, 12))[name]
    assert [len(layer) for layer in found] == [lives] * (2 if lives else 0)
    assert [block.mixer.operation for block in model.blocks] == before
    flat = [each for layer in found for each in layer]
    if name == "value memory":  # sigmoid(8) of each token
        assert flat == pytest.approx([math.log(2) / -math.log(1 / (1 + math.exp(-8)))] * 4, rel=0.1)
    elif pattern == "trellis":  # sigmoid(4)
        assert flat == pytest.approx([math.log(2) / -math.log(1 / (1 + math.exp(-4)))] * 4, rel=0.1)
    assert all(each is not None and each > 0 for each in flat)


# Recall


def test_recall_rows_hold_their_pairs_and_are_the_same_for_every_model() -> None:
    rows = recall.rows_of(8, 5, 3)
    assert rows.tokens.shape == (3, 32)
    assert torch.equal(rows.tokens[1:], recall.rows_of(8, 6, 2).tokens)
    for tokens, asked, answers in zip(rows.tokens.tolist(), rows.asked.tolist(), rows.answers.tolist()):
        stated = dict(zip(tokens[:16:2], tokens[1:16:2]))
        assert len(stated) == 8
        assert [stated[tokens[place]] for place in asked] == answers


def test_a_small_model_learns_to_recall(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = plan.plan()
    options = whole["recall"] | {"pairs": [1], "keys": 4}
    monkeypatch.setattr(recall, "plan", lambda: {**whole, "recall": options})
    recall._pieces.cache_clear()
    settings = plan.Settings("trellis-corrected", 3e-3, options["set"] | plan.table("trellis-corrected"))
    config = recall.model_config(settings)
    trained = [recall.train(config, rate=3e-3, seed=0, steps=n, tokens=512) for n in (0, 60)]
    recall_of = [recall.accuracy(model, 1) for model in trained]
    recall._pieces.cache_clear()
    assert recall_of[0] < 0.6 < 0.9 < recall_of[1]

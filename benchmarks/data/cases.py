"""What is measured, a function each; every one returns JSON."""

from __future__ import annotations

import shutil
import time
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.data.corpus import book_words, write_copies, write_synthetic_documents
from benchmarks.data.kills import kill_until_done, output_hashes
from benchmarks.data.loader import measure_loader
from benchmarks.data.rivals import bare_encoding, documents_of, straightforward_script
from benchmarks.data.watch import PeakMemory
from benchmarks.kernels.record import Case
from data_pipeline.commit import STAGES
from data_pipeline.config import (
    DataConfig,
    DecontaminateConfig,
    DedupConfig,
    FilterConfig,
    NormalizeConfig,
    SourceConfig,
    TokenizerConfig,
)
from data_pipeline.job import prepare
from data_pipeline.manifest import Manifest
from data_pipeline.tokenizer import train_tokenizer
from data_pipeline.workers import ray_session

__all__ = ["Plan", "all_cases"]

GOPHER = Path(__file__).resolve().parents[2] / "launch" / "recipes" / "filters" / "gopher.toml"
LANGUAGE = {"languages": ("en",), "language_confidence": 0.3}


def gopher() -> dict[str, Any]:
    """The shipped thresholds, as keywords of FilterConfig."""
    rules = tomllib.loads(GOPHER.read_text(encoding="utf-8"))["data"]["filters"]
    return {key: tuple(value) if isinstance(value, list) else value for key, value in rules.items()}


@dataclass(frozen=True)
class Plan:
    """Sizes of everything.

    Attributes:
        bpe_bytes, unigram_bytes: input of the two encoding cases: long enough for a minute each.
        stages_bytes: input of the case with all stages on.
        document_bytes: of the documents that the text is cut into.
        processes: workers, and processes of the rivals.
        vocab_size: pieces.
        synthetic: documents of the deduplication case.
        memory_bytes: the smaller input of the memory case; the larger has ten times as much.
        kills: SIGKILLs.
        loader_tokens: of the data set that the loader reads.
    """

    bpe_bytes: int = 10**9
    unigram_bytes: int = 22 * 10**8
    stages_bytes: int = 10**9
    document_bytes: int = 8192
    unit_bytes: int = 8 * 2**20
    processes: int = 2
    vocab_size: int = 32_000
    synthetic: int = 2_000_000
    memory_bytes: int = 6 * 10**7
    kills: int = 20
    loader_tokens: int = 10**9


@dataclass
class Bench:
    """The plan, the books, the evaluation sets (None: none at hand) and a folder to work in."""

    plan: Plan
    books: Path
    evaluations: Path | None
    work: Path

    def corpus(self, size: int) -> Path:
        """A folder of at least `size` bytes of permuted books."""
        folder = self.work / f"corpus-{size}"
        write_copies(folder, book_words(self.books), size)
        return folder

    def model(self, kind: str) -> Path:
        """A tokenizer trained on the books."""
        path = self.work / f"{kind}-{self.plan.vocab_size}.model"
        if not path.is_file():
            options = TokenizerConfig(vocab_size=self.plan.vocab_size, model_type=kind)  # type: ignore[arg-type]
            texts = (book.read_text(errors="replace") for book in sorted(self.books.glob("*.txt")))
            path.write_bytes(train_tokenizer(options, texts))
        return path

    def config(self, name: str, corpus: Path, **changes: Any) -> DataConfig:
        """A data set of that corpus, made from nothing."""
        shutil.rmtree(self.work / name, ignore_errors=True)
        return DataConfig(
            directory=str(self.work / name),
            unit_bytes=self.plan.unit_bytes,
            source=SourceConfig(kind="path", path=str(corpus), text_document_bytes=self.plan.document_bytes),
            **changes,
        )


def all_cases(bench: Bench) -> list[Case]:
    """Every case, the quick ones last."""
    cases: dict[str, Callable[[], dict[str, Any]]] = {
        "encode bpe": lambda: _encode(bench, "bpe", bench.plan.bpe_bytes),
        "encode unigram": lambda: _encode(bench, "unigram", bench.plan.unigram_bytes),
        "all stages": lambda: _all_stages(bench),
        "deduplicate": lambda: _deduplicate(bench),
        "memory": lambda: _memory(bench),
        "kills": lambda: _kills(bench),
        "loader": lambda: measure_loader(bench.work, tokens=bench.plan.loader_tokens),
    }
    return [Case(name, measure) for name, measure in cases.items()]


def _encode(bench: Bench, kind: str, size: int) -> dict[str, Any]:
    """Tokenise and shard beside bare encoding and a plain script, on the same documents."""
    corpus, model, plan = bench.corpus(size), bench.model(kind), bench.plan
    paths = sorted(corpus.glob("*.txt"))
    shared = {"size": plan.document_bytes, "processes": plan.processes}
    found: dict[str, Any] = {"input_bytes": sum(path.stat().st_size for path in paths)}
    ceiling = bare_encoding(model, paths, **shared)
    config = bench.config("encoded", corpus, tokenizer=TokenizerConfig(path=str(model)))
    made = prepare(config, workers=plan.processes, progress=False)
    script = straightforward_script(model, paths, bench.work / "script", **shared)
    seconds = dict(made.seconds)
    stage = seconds["tokenise"] + seconds["shards"]
    whole = sum(seconds.values())
    found |= {"ceiling": ceiling, "stages": seconds, "script": script, "tokens": _tokens(made)}
    found |= {"tokenise_and_shard_s": stage, "first_task_to_last_commit_s": whole}
    found |= {"of_ceiling": ceiling["seconds"] / stage, "whole_of_ceiling": ceiling["seconds"] / whole}
    found |= {"of_script": script["seconds"] / stage, "whole_of_script": script["seconds"] / whole}
    found |= {"mb_s_core": found["input_bytes"] / 1e6 / stage / plan.processes}
    found["disk_bytes"] = _disk(Path(config.directory))
    shutil.rmtree(config.directory)
    return found


def _tokens(made: Manifest) -> int:
    return sum(split.tokens for split in made.splits.values())


def _disk(directory: Path) -> dict[str, int]:
    """Bytes on disk of the shards, and of each folder of work/ that holds text or tokens."""
    found = {"shards": sum(path.stat().st_size for path in directory.glob("*.bin"))}
    for stage in (directory / "work" / name for name in STAGES):
        found[f"work/{stage.name}"] = sum(path.stat().st_size for path in stage.rglob("*") if path.is_file())
    return found


def _full_config(bench: Bench, name: str, corpus: Path, **changes: Any) -> DataConfig:
    paths = () if bench.evaluations is None else (str(bench.evaluations),)
    stages: dict[str, Any] = {
        "normalize": NormalizeConfig(form="NFC"),
        "filters": FilterConfig(**gopher(), **LANGUAGE),
        "dedup": DedupConfig(similarity=0.8),
        "decontaminate": DecontaminateConfig(paths=paths),
        "tokenizer": TokenizerConfig(path=str(bench.model("unigram"))),
        "packing": "best_fit",
        "test_fraction": 0.001,
    }
    return bench.config(name, corpus, **(stages | changes))


def _all_stages(bench: Bench) -> dict[str, Any]:
    """Everything on: Gopher's rules, language, exact and near duplicates, decontamination, encoding."""
    corpus = bench.corpus(bench.plan.stages_bytes)
    size = sum(path.stat().st_size for path in corpus.glob("*.txt"))
    config = _full_config(bench, "stages", corpus)
    with PeakMemory() as memory:
        made = prepare(config, workers=bench.plan.processes, progress=False)
    whole = sum(made.seconds.values())
    shares = {name: seconds / whole for name, seconds in made.seconds.items()}
    found = {"input_bytes": size, "stages": dict(made.seconds), "shares": shares, "whole_s": whole}
    found |= {"mb_s_core": size / 1e6 / whole / bench.plan.processes, "tokens": _tokens(made)}
    found |= {"processes": bench.plan.processes}
    found |= {"steps": made.stages, "peak_mib": memory.in_mib(), "disk_bytes": _disk(Path(config.directory))}
    found["of_clean"] = _clean_parts(bench, corpus)
    shutil.rmtree(config.directory)
    return found


def _clean_parts(bench: Bench, corpus: Path) -> dict[str, float]:
    """CPU seconds per MB of each part of "clean", in this process, on a few files."""
    from data_pipeline.decontaminate import EvaluationNgrams
    from data_pipeline.filters import Filters
    from data_pipeline.normalize import normalize
    from data_pipeline.signatures import band_keys, signatures

    paths = sorted(corpus.glob("*.txt"))[:3]
    texts = [text for path in paths for text in documents_of(path, bench.plan.document_bytes)]
    dedup = DedupConfig(similarity=0.8)
    rules, language = Filters(FilterConfig(**gopher())), Filters(FilterConfig(**LANGUAGE))  # type: ignore[arg-type]
    parts: dict[str, Callable[[], object]] = {
        "normalise": lambda: [normalize(text) for text in texts],
        "filters": lambda: [rules.reject(text) for text in texts],
        "language": lambda: [language.reject(text) for text in texts],
        "MinHash": lambda: band_keys(signatures(texts, dedup), dedup.bands),
    }
    if bench.evaluations is not None:
        ngrams = EvaluationNgrams.build([bench.evaluations], 13, NormalizeConfig())
        parts["decontaminate"] = lambda: [ngrams.find(text) for text in texts]
    size = sum(len(text.encode()) for text in texts) / 1e6
    found = {}
    for name, part in parts.items():
        start = time.process_time()
        part()
        found[name] = (time.process_time() - start) / size
    return found


def _deduplicate(bench: Bench) -> dict[str, Any]:
    """Millions of short documents, a share of them copies: what is found, and every process' memory."""
    folder = bench.work / f"synthetic-{bench.plan.synthetic}"
    planted = write_synthetic_documents(folder, bench.plan.synthetic, words=80, exact=0.05, near=0.05)
    config = bench.config("deduplicated", folder, dedup=DedupConfig(similarity=0.8))
    config = replace(config, tokenizer=TokenizerConfig(path=str(bench.model("unigram"))))
    with PeakMemory() as memory:
        made = prepare(config, workers=bench.plan.processes, progress=False)
    steps = made.stages["corpus"]
    found = {kind: steps[f"{kind} duplicates"]["documents"] for kind in ("exact", "near")}
    shutil.rmtree(config.directory)
    return {
        "documents": bench.plan.synthetic,
        "planted": planted,
        "found": found,
        "stages": dict(made.seconds),
        "peak_mib": memory.in_mib(),
        "largest_mib": max(memory.in_mib().values()),
    }


def _memory(bench: Bench) -> dict[str, Any]:
    """The largest worker, with all stages on, for an input and for one of ten times the size."""
    found = {}
    for name, size in (("small", bench.plan.memory_bytes), ("large", 10 * bench.plan.memory_bytes)):
        config = _full_config(bench, f"memory-{name}", bench.corpus(size))
        with PeakMemory() as memory:
            prepare(config, workers=bench.plan.processes, progress=False)
        found[name] = {"input_bytes": size, "worker_mib": memory.of_tasks(), "peak_mib": memory.in_mib()}
        shutil.rmtree(config.directory)
    return found | {"growth": found["large"]["worker_mib"] / found["small"]["worker_mib"]}


def _kills(bench: Bench) -> dict[str, Any]:
    """SIGKILLs at random moments on the books, and 1, 2 and 4 workers: the hashes are compared."""
    config = _full_config(bench, "straight", bench.books)
    source = replace(config.source, strip_gutenberg=True)
    config = replace(config, source=source, unit_bytes=512 * 1024)
    folder = bench.work / "killed"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    same = {}
    with ray_session(workers=bench.plan.processes, ray_address=None) as ray:
        address = ray.get_runtime_context().gcs_address
        prepare(config, workers=2, progress=False)
        straight = output_hashes(Path(config.directory))
        done = kill_until_done(config, folder, kills=bench.plan.kills, address=address, seed=1)
        sets = [path for path in folder.iterdir() if path.is_dir()]
        for workers in (1, 4):
            prepare(replace(config, directory=str(folder / f"w{workers}")), workers=workers, progress=False)
            same[str(workers)] = output_hashes(folder / f"w{workers}") == straight
    equal = sum(output_hashes(path) == straight for path in sets)
    found = {"kills": done.count, "equal": equal, "data_sets": len(sets), "files": len(straight)}
    shutil.rmtree(folder)
    shutil.rmtree(config.directory)
    return found | {"same_for_workers": same, "killed": asdict(done)}

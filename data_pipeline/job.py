"""`prepare`: a corpus to token shards, exactly once, on Ray.

Exactly once: a unit is a pure function of its inputs and the stage's config, committed under the hash of both
(commit.py), and what is decided over all units is decided in corpus order (pipeline.py). So the same bytes
come out for any number of workers, in any order, after any number of kills, and what was committed is never
made again.
"""

from __future__ import annotations

import fcntl
import platform
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_pipeline import (
    clean,
    decontaminate,
    dedup,
    fetch,
    filters,
    language,
    merge,
    normalize,
    pipeline,
    signatures,
    tokenise,
    tokenizer,
    vocabulary,
)
from data_pipeline.account import account_for
from data_pipeline.commit import clear_attempts, commit_unit, read_unit, unit_folder
from data_pipeline.config import CORPUS, DataConfig
from data_pipeline.decontaminate import EvaluationNgrams
from data_pipeline.holdout import SPLITS
from data_pipeline.manifest import (
    CONFIG,
    MANIFEST,
    Manifest,
    ShardInfo,
    SplitInfo,
    file_hashes,
    fingerprint_of,
    load_manifest,
    verify_files,
    write_manifest,
)
from data_pipeline.merge import Plan, committed_shard, plan_shards, remove_stale, write_planned
from data_pipeline.pipeline import Copies, Feed, taken
from data_pipeline.progress import Bar, say
from data_pipeline.report import write_report
from data_pipeline.rows import build_row_index
from data_pipeline.run import Run
from data_pipeline.shard import token_dtype
from data_pipeline.sources import describe, listing
from data_pipeline.tokenise import TokenStage
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.vocabulary import given_tokenizer, obtain_tokenizer
from data_pipeline.workers import Workers, default_workers
from trellis_dist.files import REAL, atomic_write, digest, remove_temporaries, sha256_file, write_json

__all__ = ["config_digest", "locked", "prepare"]

# Of the code that decides the shards' bytes.
VERSIONS = [
    part.VERSION
    for part in (fetch, normalize, filters, language, decontaminate, signatures, clean, dedup, vocabulary)
] + [part.VERSION for part in (tokenizer, tokenise, merge)]


def prepare(
    config: DataConfig,
    *,
    workers: int | None = None,
    ray_address: str | None = None,
    progress: bool = True,
    chunk_size: int = 1,
) -> Manifest:
    """Turn the corpus into a tokenizer and token shards in ``config.directory``; re-use what is there.

    A finished data set of the same config and the same files is returned at once. Otherwise only what is
    missing is made: a killed run continues, a changed config re-uses the work units it does not concern.

    Args:
        config: the data section of a recipe.
        workers: Ray workers at a time; None takes all cores. The result does not depend on it.
        ray_address: a running Ray cluster whose nodes share ``config.directory`` and the corpus.
        progress: show a progress bar and one line per decision on stderr.
        chunk_size: C of the model, for the row index where ``config.chunk_aligned``.

    Returns:
        The manifest, which is also in ``config.directory``/manifest.json.

    Raises:
        ValueError: the corpus is missing, empty or too small, or the tokenizer cannot be had from it.
        OSError: the disk is full, an input changed or vanished, ...; what is committed stays.
    """
    directory = Path(config.directory).resolve()
    _check_apart(config, directory)
    directory.mkdir(parents=True, exist_ok=True)
    threads = workers or default_workers()
    with locked(directory), Workers(workers, ray_address) as pool:
        run = Run(directory, pool, threads, progress)
        manifest = _finished(config, directory)
        if manifest is not None:
            say(progress, f"re-using the data set in {directory} ({manifest.fingerprint[:12]})")
        else:
            manifest = _make(config, run)
        _index_rows(config, manifest, run, chunk_size)
        return manifest


def _check_apart(config: DataConfig, directory: Path) -> None:
    """Refuse a data set inside its own corpus: its logs would be read as text by the next run."""
    for name, source in config.sources.items():
        if source.kind == "path" and directory.is_relative_to(Path(source.path or "").resolve()):
            raise ValueError(
                f"data.directory = {str(directory)!r} lies inside the corpus {source.path!r} ({name}): "
                "choose a folder outside it"
            )


def config_digest(config: DataConfig, made: Manifest | None = None) -> str:
    """Hash of what decides the shards: not of places, nor of how rows are later cut and ordered.

    Args:
        config: the data section.
        made: a finished data set: where the given tokenizer is gone, it is the one stored there.
    """
    fields = asdict(config)
    for name in (
        "directory",
        "sequence_length",
        "packing",
        "chunk_aligned",
        "carry_rows",
        "seed",
        "source",
        "mixture",
    ):
        del fields[name]
    fields["sources"] = {name: asdict(source) for name, source in config.sources.items()}
    for source in fields["sources"].values():
        for name in ("path", "licence", "weight"):
            del source[name]
    if any(source.kind == "stdlib" for source in config.sources.values()):
        fields["python"] = platform.python_version()
    if config.tokenizer.path is not None:
        fields["tokenizer"] = _stored_sha256(config, made) or given_tokenizer(config.tokenizer).sha256
    fields["decontaminate"]["paths"] = _evaluation_files(config)
    return digest([VERSIONS, fields])


def _stored_sha256(config: DataConfig, made: Manifest | None) -> str | None:
    """Of the tokenizer that a finished data set was made with, where the file of that name is gone."""
    given = config.tokenizer.path
    if made is None or made.tokenizer["path"] != given or Path(given or "").is_file():
        return None
    return str(made.tokenizer["sha256"])


def _evaluation_files(config: DataConfig) -> list[str]:
    """Hashes of the evaluation sets' files."""
    found = []
    for root in map(Path, config.decontaminate.paths):
        paths = sorted(path for path in root.rglob("*") if path.is_file()) if root.is_dir() else [root]
        found += [sha256_file(path) for path in paths if path.is_file()]
    return found


def _make(config: DataConfig, run: Run) -> Manifest:
    with run.stage("plan"):
        clear_attempts(run.work, [run.directory, run.directory / "index"])
        if config.tokenizer.path is not None:
            given_tokenizer(config.tokenizer)  # an error now, and not after hours
        files = _listing(config)  # first: what changes from here on is not taken for what was read
        ngrams = _evaluation_ngrams(config, run)
        feeds = pipeline.plan_feeds(config, ngrams=ngrams[0], ngrams_sha256=ngrams[1])
    stage, copies = _rounds(config, feeds, run)
    with run.stage("shards"):
        plans = _plan_shards(config, feeds, copies, stage, run)
        # From here the old data set is no longer whole: its manifest goes first.
        REAL.unlink(run.directory / MANIFEST)
        REAL.fsync_directory(run.directory)
        shards = _shards(plans, run)
        _publish(config, stage, run)
    with run.stage("account"):
        account = account_for(run, feeds, copies, stage)
    own = config_digest(config)
    codec = Tokenizer.load(stage.tokenizer)
    identity = {"sha256": codec.sha256, "vocab_size": codec.vocab_size}
    splits = _splits(shards)
    manifest = Manifest(
        fingerprint=fingerprint_of(own, codec.sha256, splits),
        config_digest=own,
        source=_describe(config),
        listing=files,
        tokenizer=asdict(config.tokenizer) | identity | {"bos": codec.bos_id, "eos": codec.eos_id},
        splits=splits,
        sources=account.labels,
        stages=account.stages,
        quarantined=account.quarantined,
        logs=account.logs,
        seconds=run.seconds,
    )
    with run.stage("verify"):
        _verify(manifest, run)
    with run.stage("report"):
        write_report(run.directory, manifest, config)
    remove_temporaries(run.directory)  # of workers that were killed while this run went on
    write_manifest(run.directory, manifest)
    remove_stale(run.directory, manifest)
    return manifest


def _rounds(config: DataConfig, feeds: Sequence[Feed], run: Run) -> tuple[TokenStage, Copies]:
    """The stages up to "tokens", again with more units while a budget wants them."""
    stage = None
    while True:
        with run.stage("clean"):
            pipeline.clean(feeds, run)
        with run.stage("deduplicate"):
            copies = pipeline.find_copies(feeds, config, run)
        if stage is None:
            with run.stage("tokenizer"):
                holdout = pipeline.hold_out(feeds, copies, config, run)
                path = obtain_tokenizer(config.tokenizer, copies, holdout, run)
                codec = Tokenizer.load(path)
            stage = TokenStage(holdout, str(path), codec.sha256, codec.library)
        with run.stage("tokenise"):
            pipeline.tokens(feeds, copies, stage, run)
            moved = pipeline.note_reach(feeds, copies, stage, run.work)
        if pipeline.open_more(feeds):
            say(run.progress, "the budget is not filled: opening more of the corpus")
        elif moved:
            say(
                run.progress,
                "a budget ends before its copies: later sources may hold them, once more from there",
            )
        else:
            return stage, copies


def _evaluation_ngrams(config: DataConfig, run: Run) -> tuple[Path | None, str | None]:
    if not config.decontaminate.paths:
        return None, None
    found = EvaluationNgrams.build(
        config.decontaminate.paths, config.decontaminate.ngram_words, config.normalize
    )
    folder = unit_folder(run.work, "ngrams", found.sha256)

    def write(attempt: Path) -> dict[str, Any]:
        found.save(attempt / "ngrams")
        return {}

    if read_unit(folder) is None:
        commit_unit(run.work, "ngrams", found.sha256, write)
    return folder / "ngrams", found.sha256


def _plan_shards(
    config: DataConfig, feeds: Sequence[Feed], copies: Copies, stage: TokenStage, run: Run
) -> list[Plan]:
    """The shards to be. Raises ValueError: a split is left without documents."""
    size = Tokenizer.load(stage.tokenizer).vocab_size
    plans = []
    for feed in feeds:
        documents = list(taken(feed, copies, stage, run.work))
        plans += plan_shards(feed.name, documents, shard_tokens=config.shard_tokens, vocab_size=size)
    found = {plan.name.partition("-")[0] for plan in plans}
    for split in SPLITS if config.test_fraction else SPLITS[:-1]:
        if split not in found:
            raise ValueError(
                f"no document fell in the {split} split: use more documents or a larger "
                f"data.{'test' if split == 'test' else 'validation'}_fraction"
            )
    return plans


def _publish(config: DataConfig, stage: TokenStage, run: Run) -> None:
    """What stands beside the shards and belongs to their manifest."""
    codec = Tokenizer.load(stage.tokenizer)
    atomic_write(run.directory / "tokenizer.vocab", codec.vocabulary())
    atomic_write(run.directory / "tokenizer.model", codec.model)
    write_json(run.directory / CONFIG, asdict(config))


def _shards(plans: Sequence[Plan], run: Run) -> list[ShardInfo]:
    known = {plan.name: committed_shard(run.directory, plan) for plan in plans}
    missing = [plan for plan in plans if known[plan.name] is None]
    calls = [(plan, str(run.directory)) for plan in missing]
    with Bar("shards", len(calls), shown=run.progress and bool(calls)) as bar:
        for position, shard in run.workers.run(write_planned, calls):
            known[missing[position].name] = shard
            bar.count({"documents": shard.documents, "bytes": shard.bytes, "tokens": shard.tokens})
    return [shard for shard in known.values() if shard is not None]


def _splits(shards: Iterable[ShardInfo]) -> dict[str, SplitInfo]:
    found: dict[str, list[ShardInfo]] = {}
    for shard in shards:
        found.setdefault(shard.name.partition("-")[0], []).append(shard)
    return {
        name: SplitInfo(
            documents=sum(shard.documents for shard in chosen),
            tokens=sum(shard.tokens for shard in chosen),
            bytes=sum(shard.bytes for shard in chosen),
            shards=tuple(chosen),
        )
        for name, chosen in sorted(found.items(), key=lambda item: SPLITS.index(item[0]))
    }


def _verify(manifest: Manifest, run: Run) -> None:
    """Read everything back once: what the manifest vouches for is on the disk."""
    problems = verify_files(run.directory, file_hashes(manifest), threads=run.threads)
    if problems:
        raise OSError("; ".join(problems))


def _index_rows(config: DataConfig, manifest: Manifest, run: Run, chunk_size: int) -> None:
    """The row index of every shard, where the packing has one."""
    align = chunk_size if config.chunk_aligned else 1
    if config.packing == "concat" and align == 1:
        return
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    with run.stage("row index"):
        for shard in shards:
            build_row_index(
                run.directory,
                shard,
                packing=config.packing,
                sequence_length=config.sequence_length,
                align=align,
            )


def _describe(config: DataConfig) -> dict[str, Any]:
    """The corpus for the manifest, or a description per source of a mixture."""
    found = {name: describe(source) for name, source in config.sources.items()}
    return found[CORPUS] if set(found) == {CORPUS} else {"kind": "mixture", "sources": found}


def _listing(config: DataConfig) -> str | None:
    """Hash of what can be listed of all sources; None where there is nothing to list, or one is gone."""
    found = {name: listing(source) for name, source in config.sources.items()}
    return found[CORPUS] if set(found) == {CORPUS} else digest(found) if all(found.values()) else None


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """One job per data set; the lock goes with the process, however it ends."""
    with open(directory / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another job is preparing {directory}: wait for it, or choose another data.directory"
            ) from error
        yield


def _finished(config: DataConfig, directory: Path) -> Manifest | None:
    """The data set that is there, if it is the one asked for and its files have their sizes."""
    try:
        manifest = load_manifest(directory)
    except (FileNotFoundError, ValueError):
        return None
    if manifest.config_digest != config_digest(config, manifest) or manifest.source != _describe(config):
        return None
    now = _listing(config)
    if now is not None and now != manifest.listing:
        return None
    remove_temporaries(directory)
    width = token_dtype(manifest.tokenizer["vocab_size"]).itemsize
    sizes: dict[str, int | None] = dict.fromkeys(("tokenizer.model", "report.html", *manifest.logs))
    for shard in (shard for split in manifest.splits.values() for shard in split.shards):
        sizes |= {f"{shard.name}.idx": None, f"{shard.name}.bin": shard.tokens * width}
    whole = all(_has(directory / name, size) for name, size in sizes.items())
    return manifest if whole else None


def _has(path: Path, size: int | None) -> bool:
    return path.is_file() and size in (None, path.stat().st_size)

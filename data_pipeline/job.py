"""`prepare`: a corpus to token shards, exactly once, on Ray.

    plan -> hold out -> tokenizer -> work units (Ray tasks) -> shards -> manifest -> report

Exactly once: a unit is a pure function of its inputs and the stage's config, committed under the hash of
both; shards are made from committed units in corpus order. So the same bytes come out for any number of
workers, in any order, after any number of kills, and what was committed is never made again.
"""

from __future__ import annotations

import fcntl
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_pipeline import normalize
from data_pipeline.config import DataConfig
from data_pipeline.content import check_unchanged
from data_pipeline.holdout import held_out_below
from data_pipeline.manifest import MANIFEST, Manifest, fingerprint_of, load_manifest, write_manifest
from data_pipeline.merge import Merged, enough, merge_units, remove_stale_shards
from data_pipeline.progress import Bar, say
from data_pipeline.report import write_report
from data_pipeline.shard import token_dtype
from data_pipeline.sources import Unit, describe, listing, plan_units
from data_pipeline.tokenizer import Tokenizer, train_tokenizer
from data_pipeline.unit import QUARANTINE, VERSION, Stage, process_unit, read_unit, sample_texts
from data_pipeline.workers import default_workers, ray_session, run_tasks
from trellis_dist.files import REAL, atomic_write, digest, remove_temporaries, sha256_file

__all__ = ["config_digest", "prepare"]

# A tokenizer's sample takes no less than this from a work unit that it draws on.
SAMPLE_PAGE = 65536


def prepare(
    config: DataConfig, *, workers: int | None = None, ray_address: str | None = None, progress: bool = True
) -> Manifest:
    """Turn the corpus into a tokenizer and token shards in ``config.directory``; re-use what is there.

    A finished data set of the same config and the same files is returned at once. Otherwise only what is
    missing is made: a killed run continues, a changed config re-uses the work units it does not concern.

    Args:
        config: the data section of a recipe.
        workers: Ray workers on this machine; None takes its cores. The result does not depend on it.
        ray_address: a running Ray cluster whose nodes share ``config.directory`` and the corpus.
        progress: show a progress bar and one line per decision on stderr.

    Returns:
        The manifest, which is also in ``config.directory``/manifest.json.

    Raises:
        ValueError: the corpus is missing, empty or too small, or the tokenizer cannot be had from it.
        OSError: the disk is full, an input changed or vanished, ...; what is committed stays.
    """
    directory = Path(config.directory).resolve()
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory):
        finished = _finished(config, directory)
        if finished is not None:
            say(progress, f"re-using the data set in {directory} ({finished.fingerprint[:12]})")
            return finished
        return _make(config, directory, _Run(workers or default_workers(), ray_address, progress))


def config_digest(config: DataConfig) -> str:
    """Hash of what decides the shards: not of places, nor of how rows are later cut and ordered."""
    fields = asdict(config)
    for name in ("directory", "sequence_length", "packing", "seed"):
        del fields[name]
    for name in ("path", "licence"):
        del fields["source"][name]
    if config.source.kind == "stdlib":
        fields["python"] = platform.python_version()
    if config.tokenizer.path is not None:
        fields["tokenizer"] = _given_tokenizer(config).sha256
    return digest([VERSION, normalize.VERSION, fields])


class _Run:
    """How this run works and how long its stages took; nothing here changes what is made."""

    def __init__(self, workers: int, ray_address: str | None, progress: bool) -> None:
        self.workers, self.ray_address, self.progress = workers, ray_address, progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)


def _make(config: DataConfig, directory: Path, run: _Run) -> Manifest:
    work = directory / "work"
    with run.stage("plan"):
        _clean(directory)
        files = listing(config.source)  # first: what changes from here on is not taken for what was read
        units = plan_units(config.source, config.unit_bytes)
        below = held_out_below(units, config.source, config.validation_fraction)
    with run.stage("tokenizer"):
        tokenizer = _tokenizer(config, directory, units, below=below, run=run)
    stage = Stage(config.source, below, tokenizer.sha256)
    entries = _tokenise(units, stage, directory, run)
    with run.stage("shards"):
        # From here the old data set is no longer whole: its manifest goes first.
        (directory / MANIFEST).unlink(missing_ok=True)
        folders = [work / "units" / stage.key(unit) for unit in units[: len(entries)]]
        merged = merge_units(
            directory,
            folders,
            limit=config.source.max_documents,
            shard_tokens=config.shard_tokens,
            vocab_size=tokenizer.vocab_size,
        )
        atomic_write(directory / QUARANTINE, ((folder / QUARANTINE).read_bytes() for folder in folders))
        quarantined = sum(entry["quarantined"] for entry in entries)
    manifest = _manifest(config, directory, tokenizer, merged, files=files, quarantined=quarantined, run=run)
    with run.stage("report"):
        write_report(directory, manifest, config)
    write_manifest(directory, manifest)
    remove_stale_shards(directory, manifest)
    return manifest


def _manifest(
    config: DataConfig,
    directory: Path,
    tokenizer: Tokenizer,
    merged: Merged,
    *,
    files: str | None,
    quarantined: int,
    run: _Run,
) -> Manifest:
    own = config_digest(config)
    identity = {"sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size}
    return Manifest(
        fingerprint=fingerprint_of(own, tokenizer.sha256, merged.splits),
        config_digest=own,
        source=describe(config.source),
        listing=files,
        tokenizer=asdict(config.tokenizer) | identity | {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id},
        splits=merged.splits,
        sources=merged.sources,
        quarantined=quarantined,
        quarantine_sha256=sha256_file(directory / QUARANTINE),
        seconds=run.seconds,
    )


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
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
    if manifest.config_digest != config_digest(config) or manifest.source != describe(config.source):
        return None
    now = listing(config.source)
    if now is not None and now != manifest.listing:
        return None
    width = token_dtype(manifest.tokenizer["vocab_size"]).itemsize
    sizes: dict[str, int | None] = dict.fromkeys(("tokenizer.model", QUARANTINE, "report.html"))
    for shard in (shard for split in manifest.splits.values() for shard in split.shards):
        sizes |= {f"{shard.name}.idx": None, f"{shard.name}.bin": shard.tokens * width}
    whole = all(_has(directory / name, size) for name, size in sizes.items())
    return manifest if whole else None


def _has(path: Path, size: int | None) -> bool:
    return path.is_file() and size in (None, path.stat().st_size)


def _clean(directory: Path) -> None:
    """Make the work folders; what killed runs left half done goes, what was committed stays."""
    work = directory / "work"
    REAL.remove_tree(work / "attempts")
    for name in ("attempts", "units", "tokenizers"):
        (work / name).mkdir(parents=True, exist_ok=True)
    for folder in (directory, work / "tokenizers"):
        remove_temporaries(folder)


def _given_tokenizer(config: DataConfig) -> Tokenizer:
    path = Path(config.tokenizer.path or "")
    if not path.is_file():
        raise ValueError(f"data.tokenizer.path = {str(path)!r} does not exist: leave it out to train one")
    return Tokenizer.load(path)


def _tokenizer(
    config: DataConfig, directory: Path, units: Sequence[Unit], *, below: int, run: _Run
) -> Tokenizer:
    """The given tokenizer, the one trained before on the same sample, or a new one; also in the directory."""
    options = config.tokenizer
    if options.path is not None:
        tokenizer = _given_tokenizer(config)
    else:
        key = digest([Stage(config.source, below, "").key(unit) for unit in units] + [asdict(options)])
        path = directory / "work" / "tokenizers" / f"{key}.model"
        if not path.is_file():
            say(run.progress, f"training a {options.model_type} tokenizer of {options.vocab_size} pieces")
            atomic_write(path, _train(config, units, below))
        tokenizer = Tokenizer.load(path)
    atomic_write(directory / "tokenizer.vocab", tokenizer.vocabulary())
    atomic_write(directory / "tokenizer.model", tokenizer.model)
    return tokenizer


def _train(config: DataConfig, units: Sequence[Unit], below: int) -> bytes:
    options = config.tokenizer
    # Equal shares of every unit; of a huge corpus, of units spread evenly over it.
    most = max(1, options.sample_bytes // SAMPLE_PAGE)
    chosen = units[:: -(-len(units) // most)]
    share = -(-options.sample_bytes // len(chosen))
    model = train_tokenizer(options, sample_texts(chosen, config.source, below, share))
    check_unchanged(item for unit in chosen for item in unit.items)
    return model


def _tokenise(units: Sequence[Unit], stage: Stage, directory: Path, run: _Run) -> list[dict[str, Any]]:
    """Entries of the units in corpus order, missing ones made, up to the one that fills ``max_documents``."""
    limit = stage.source.max_documents
    entries = [read_unit(directory / "work" / "units" / stage.key(unit)) for unit in units]
    missing = [index for index, entry in enumerate(entries) if entry is None]
    if missing and enough(entries, limit) is None:
        if len(missing) < len(units):
            say(run.progress, f"re-using {len(units) - len(missing)} of {len(units)} work units")
        calls = [
            (units[index], stage, str(directory / "tokenizer.model"), str(directory / "work"))
            for index in missing
        ]
        start = time.perf_counter()
        with ray_session(workers=run.workers, ray_address=run.ray_address) as ray:
            run.seconds["ray start"] = round(time.perf_counter() - start, 3)
            with (
                run.stage("tokenise"),
                Bar(len(missing), shown=run.progress) as bar,
                closing(run_tasks(ray, process_unit, calls, workers=run.workers)) as results,
            ):
                for position, entry in results:
                    entries[missing[position]] = entry
                    bar.count(entry)
                    if enough(entries, limit) is not None:
                        break
    count = enough(entries, limit)
    return [entry for entry in entries[:count] if entry is not None]

"""The manifest: what a prepared data set is, with the hash of every file, in one JSON file written last.

Its last word is the hash of all others, so that a count that was changed is noticed like a changed shard.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trellis_dist.files import digest, read_json, sha256_file, write_json

__all__ = [
    "CONFIG",
    "MANIFEST",
    "SHARD",
    "Manifest",
    "ShardInfo",
    "SplitInfo",
    "damaged_files",
    "file_hashes",
    "load_manifest",
    "verify_dataset",
    "verify_files",
    "write_manifest",
]

MANIFEST, TIMINGS, CONFIG = "manifest.json", "timings.json", "config.json"
# train-00000, or train-books-00000 in a mixture.
SHARD = re.compile(r"(?P<split>train|validation|test)(-[A-Za-z_][A-Za-z0-9_]*)?-[0-9]{5}")
REMAKE = "delete it and run `trellis prepare` again: only what is missing is made"


@dataclass(frozen=True)
class ShardInfo:
    """One shard: NAME.bin and NAME.idx, documents of one source of the recipe."""

    name: str
    source: str
    sha256_bin: str
    sha256_idx: str
    documents: int
    tokens: int
    bytes: int


@dataclass(frozen=True)
class SplitInfo:
    """One split. `tokens` are stored tokens (BOS and EOS of each document included), `bytes` the UTF-8 bytes
    of its normalised text."""

    documents: int
    tokens: int
    bytes: int
    shards: tuple[ShardInfo, ...]


@dataclass(frozen=True)
class Manifest:
    """A prepared data set.

    Attributes:
        fingerprint: hash over tokenizer, shards, their counts and config: two data sets with the same one are
            the same, wherever their corpus lay.
        config_digest: hash of the config fields that decide the shards.
        source: what the corpus is: kind, licence, path or name, Python version for "stdlib".
        listing: hash of the corpus' file names, sizes and times of change before it was read; None where
            there are none.
        tokenizer: sha256, vocab_size, bos, eos and the training options.
        splits: "train", "validation", and "test" where a share is held out for it.
        sources: documents, tokens and bytes per label of the corpus' documents.
        stages: per source of the recipe, per step, documents and bytes (account.py).
        quarantined: records left out; quarantine.jsonl names each.
        logs: hash of each log: quarantine, contamination, dropped, duplicates (.jsonl).
        seconds: per stage; kept in timings.json, so that equal data sets have equal manifests.
    """

    fingerprint: str
    config_digest: str
    source: Mapping[str, Any]
    listing: str | None
    tokenizer: Mapping[str, Any]
    splits: Mapping[str, SplitInfo]
    sources: Mapping[str, Mapping[str, int]]
    stages: Mapping[str, Mapping[str, Mapping[str, int]]]
    quarantined: int
    logs: Mapping[str, str]
    seconds: Mapping[str, float] = field(default_factory=dict)


def fingerprint_of(config_digest: str, tokenizer_sha256: str, splits: Mapping[str, SplitInfo]) -> str:
    """Hash over config, tokenizer, shard hashes and counts."""
    counted = {name: asdict(split) for name, split in splits.items()}
    return digest({"config": config_digest, "tokenizer": tokenizer_sha256, "splits": counted})


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write timings.json, then manifest.json: from then on the data set is complete. Raises OSError."""
    fields = asdict(manifest)
    write_json(directory / TIMINGS, fields.pop("seconds"))
    write_json(directory / MANIFEST, fields | {"sha256": digest(fields)})


def load_manifest(directory: Path | str) -> Manifest:
    """Read a prepared data set's manifest.

    Raises:
        FileNotFoundError: there is none: the data set was never finished.
        ValueError: it is damaged; the message names the file.
    """
    path = Path(directory) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"no prepared data set in {directory} ({MANIFEST} is missing): run `trellis prepare`"
        )
    fields = read_json(path)
    try:
        seal = fields.pop("sha256")
        whole = seal == digest(fields)
        splits = {
            name: SplitInfo(**(split | {"shards": tuple(ShardInfo(**shard) for shard in split["shards"])}))
            for name, split in fields.pop("splits").items()
        }
        timings = path.with_name(TIMINGS)
        seconds = read_json(timings) if timings.is_file() else {}
        manifest = Manifest(**fields, splits=splits, seconds=seconds)
        expected = fingerprint_of(manifest.config_digest, manifest.tokenizer["sha256"], splits)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no data set manifest of this version ({error}): {REMAKE}") from error
    if not whole or manifest.fingerprint != expected:
        raise ValueError(f"{path} is damaged (its content does not match its hashes): {REMAKE}")
    strange = [name for name in manifest.logs if not re.fullmatch(r"[a-z]+\.jsonl", str(name))]
    if strange:
        raise ValueError(f"{path} is damaged ({strange[0]!r} is no log): {REMAKE}")
    for name, split in splits.items():
        if (problem := _problem(name, split)) is not None:
            raise ValueError(f"{path} is damaged ({problem}): {REMAKE}")
    return manifest


def _problem(name: str, split: SplitInfo) -> str | None:
    """A shard's name becomes a path and its counts become sizes, so both are looked at first."""
    for shard in split.shards:
        if not (found := SHARD.fullmatch(str(shard.name))) or found["split"] != name:
            return f"{shard.name!r} is no shard of the {name} split"
    parts: list[SplitInfo | ShardInfo] = [split, *split.shards]
    counts = [count for part in parts for count in (part.documents, part.tokens, part.bytes)]
    wrong = [count for count in counts if type(count) is not int or count < 0]
    return f"{wrong[0]!r} is no count" if wrong else None


def file_hashes(manifest: Manifest) -> dict[str, str]:
    """File name -> sha256 of every file the manifest vouches for."""
    hashes = {"tokenizer.model": manifest.tokenizer["sha256"], **manifest.logs}
    for split in manifest.splits.values():
        for shard in split.shards:
            hashes[f"{shard.name}.bin"] = shard.sha256_bin
            hashes[f"{shard.name}.idx"] = shard.sha256_idx
    return hashes


def verify_files(directory: Path, hashes: Mapping[str, str], *, threads: int = 1) -> list[str]:
    """Problems of the named files, one line each with path and remedy; empty when all is well."""
    return list(damaged_files(directory, hashes, threads=threads).values())


def damaged_files(directory: Path, hashes: Mapping[str, str], *, threads: int = 1) -> dict[str, str]:
    """File name -> what is wrong with it, of those among `hashes` that are not as they were written."""

    def problem(name: str) -> str | None:
        path = directory / name
        if not path.is_file():
            return f"{path} is missing: run `trellis prepare` again"
        if (found := sha256_file(path)) != hashes[name]:
            return f"{path} is damaged (sha256 {found[:12]}, manifest {hashes[name][:12]}): {REMAKE}"
        return None

    with ThreadPoolExecutor(max_workers=threads) as pool:  # hashing leaves the interpreter's lock
        found = zip(hashes, pool.map(problem, hashes))
        return {name: line for name, line in found if line is not None}


def verify_dataset(directory: Path | str) -> list[str]:
    """Check every file of a prepared data set against its manifest.

    Returns:
        One line per problem, naming the file; an empty list when all is well.
    """
    try:
        manifest = load_manifest(directory)
    except (OSError, ValueError) as error:
        return [str(error)]
    return verify_files(Path(directory), file_hashes(manifest))

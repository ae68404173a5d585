"""Input that nobody wants: it is left out by name, the rest is kept, and memory stays under its cap."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard

from data_pipeline.clean import CleanStage, clean_unit, read_texts
from data_pipeline.commit import clear_attempts, unit_folder
from data_pipeline.config import DedupConfig, FilterConfig, NormalizeConfig, SourceConfig
from data_pipeline.readers import Quarantined
from data_pipeline.sources import plan_units
from tests.data_pipeline.texts import prose, rows, unit_documents

# Cleans one file in a process of its own; prints what it kept and left out, and its peak memory in MiB.
CHILD = """
import json, re, sys
from pathlib import Path
from tests.data_pipeline.test_hostile import clean_all
kept, reasons = clean_all(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
# Not getrusage: its peak begins with that of the process that started this one.
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024
print(json.dumps({"kept": [len(text) for text in kept], "reasons": reasons, "peak": peak}))
"""


def clean_all(path: Path, work: Path, options: dict[str, int]) -> tuple[list[str], list[list[str]]]:
    """Texts kept, and file and reason of what was left out."""
    clear_attempts(work)
    source = SourceConfig(kind="path", path=str(path), **options)  # type: ignore[arg-type]
    stage = CleanStage(source, NormalizeConfig(), FilterConfig(), DedupConfig())
    texts, reasons = [], []
    for unit in (unit.sealed() for unit in plan_units(source, 2**21)):
        clean_unit(unit, stage, stage.key(unit), str(work))
        folder = unit_folder(work, "clean", stage.key(unit))
        texts += list(read_texts(folder))
        lines = (folder / "quarantine.jsonl").read_text().splitlines()
        reasons += [[json.loads(line)["file"], json.loads(line)["reason"]] for line in lines]
    return texts, reasons


def in_a_process(path: Path, work: Path, **options: int) -> dict:
    command = [sys.executable, "-c", CHILD, str(path), str(work), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict = json.loads(done.stdout)
    return found


MEGABYTES = 50


def test_a_line_of_fifty_megabytes_is_a_document_like_any_other(tmp_path: Path) -> None:
    line = ("word " * (MEGABYTES * 200_000)).strip()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.jsonl").write_text(
        rows(range(1))[0] + json.dumps({"text": line}) + "\n" + rows(range(2))[1]
    )
    found = in_a_process(tmp_path / "text", tmp_path / "work")
    assert found["kept"] == [len(prose(0)), len(line), len(prose(1))]
    assert found["peak"] < 12 * MEGABYTES
    found = in_a_process(tmp_path / "text", tmp_path / "small", max_document_bytes=2**20)
    assert found["kept"] == [len(prose(0)), len(prose(1))]
    assert ["a.jsonl", "record longer than 8392704 bytes"] in found["reasons"]


def test_a_text_file_of_one_line_can_be_cut(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("\u00e9" * (MEGABYTES * 500_000))
    found = in_a_process(tmp_path / "text", tmp_path / "work", text_document_bytes=100_000)
    assert sum(found["kept"]) == MEGABYTES * 500_000
    assert max(found["kept"]) <= 100_000
    assert not found["reasons"]
    assert found["peak"] < 400


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_bomb_is_cut_off_before_it_fills_memory(tmp_path: Path, suffix: str) -> None:
    """Half a gigabyte of one letter in a line that never ends, behind a good record."""
    (tmp_path / "text").mkdir()
    path = tmp_path / "text" / f"a.jsonl.{suffix}"
    packer = gzip.GzipFile(path, "wb", 6) if suffix == "gz" else zstandard.open(path, "wb")
    with packer as file:
        file.write(rows(range(1))[0].encode() + b'{"text": "')
        for _ in range(512):
            file.write(b"a" * 2**20)
    assert path.stat().st_size < 6e5
    found = in_a_process(tmp_path / "text", tmp_path / "work")
    assert found["kept"] == [len(prose(0))]
    assert [reason for _, reason in found["reasons"]] == ["expands over 200 times: rest left out"]
    assert found["peak"] < 500


def test_encodings_are_never_guessed(tmp_path: Path) -> None:
    good = "na\u00efve caf\u00e9 \u4e2d\u6587 \U0001f600"
    (tmp_path / "a-utf8.txt").write_bytes(good.encode())
    (tmp_path / "b-mark.txt").write_bytes(good.encode("utf-8-sig"))
    (tmp_path / "c-latin1.txt").write_bytes("na\u00efve caf\u00e9".encode("latin-1"))
    (tmp_path / "d-utf16.txt").write_bytes(good.encode("utf-16"))
    (tmp_path / "e-cp1251.txt").write_bytes("\u043f\u0440\u0438\u0432\u0435\u0442".encode("cp1251"))
    (tmp_path / "f-empty.txt").write_bytes(b"")
    (tmp_path / "g-blank.txt").write_bytes(b"\n\n \t\n")
    lines = [
        json.dumps({"text": good}).encode(),
        json.dumps({"text": "caf\u00e9"}, ensure_ascii=False).encode("latin-1"),
    ]
    (tmp_path / "h.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    (tmp_path / "i-empty.jsonl").write_bytes(b"")
    texts, reasons = clean_all(tmp_path, tmp_path / "work", {})
    assert texts == [good] * 3
    names = [file for file, _ in reasons]
    assert names == ["c-latin1.txt", "d-utf16.txt", "e-cp1251.txt", "f-empty.txt", "g-blank.txt", "h.jsonl"]
    assert all("not UTF-8" in reason or "no text" in reason for _, reason in reasons)


def test_text_of_every_script_comes_back(tmp_path: Path) -> None:
    texts = [
        "\u0639\u0631\u0628\u064a",
        "\u4e2d\u6587\u3002",
        "\u0e44\u0e17\u0e22",
        "\U0001f468\u200d\U0001f469",
        "a\u0301".strip(),
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found, reasons = clean_all(tmp_path, tmp_path / "work", {})
    assert found == [*texts[:-1], "\u00e1"]
    assert not reasons
    source = SourceConfig(kind="path", path=str(tmp_path / "a.jsonl"))
    (unit,) = plan_units(source, 2**20)
    assert not [found for found in unit_documents(unit, source) if isinstance(found, Quarantined)]

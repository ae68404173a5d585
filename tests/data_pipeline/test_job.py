from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline import manifest, pipeline, workers
from data_pipeline.config import SourceConfig, TokenizerConfig
from data_pipeline.job import prepare
from data_pipeline.loader import TokenDataset
from data_pipeline.manifest import Manifest, load_manifest, verify_dataset
from data_pipeline.sources import describe
from data_pipeline.tokenizer import Tokenizer
from tests.data_pipeline.texts import MARKUP, hashes, prose, rows, settings

Prepared = tuple[Path, Manifest]


def documents(directory: Path, split: str) -> list[str]:
    tokenizer = Tokenizer.load(directory / "tokenizer.model")
    data = TokenDataset(directory, split, sequence_length=64, seed=0)
    found = [data.tokens_of(i).tolist() for i in range(data.num_documents)]
    assert all(ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id for ids in found)
    return [tokenizer.decode(ids[1:-1]) for ids in found]


def committed(directory: Path) -> set[str]:
    work = directory / "work"
    return {path.name for stage in ("clean", "tokens") for path in (work / stage).iterdir()}


def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(workers, "ray_session", refuse)


def no_units(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a unit was made again")

    for name in ("clean_unit", "token_unit", "run_partition"):
        monkeypatch.setattr(pipeline, name, refuse)


def test_the_shards_hold_every_document_whole_in_one_split(prepared: Prepared) -> None:
    directory, made = prepared
    train, validation = (documents(directory, split) for split in ("train", "validation"))
    expected = [prose(seed) for seed in range(60)]
    expected[9] = MARKUP + expected[9]
    assert sorted(train + validation) == sorted(expected)
    assert not set(train) & set(validation)
    assert len(validation) >= 1
    for name, texts in (("train", train), ("validation", validation)):
        split = made.splits[name]
        assert (split.documents, split.bytes) == (len(texts), sum(len(t.encode()) for t in texts))
    assert {label: sums["documents"] for label, sums in made.sources.items()} == {
        "jsonl": 40,
        "parquet": 10,
        "text": 10,
    }
    assert load_manifest(directory) == made
    assert verify_dataset(directory) == []


def test_one_worker_gives_the_same_bytes(prepared: Prepared, corpus: Path, tmp_path: Path) -> None:
    prepare(settings(tmp_path, corpus), workers=1, progress=False)
    assert hashes(tmp_path) == hashes(prepared[0])


def test_killed_workers_are_replaced(
    prepared: Prepared, corpus: Path, tmp_path: Path, ray_cluster: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    process = pipeline.clean_unit

    def dies_once(*arguments: object) -> object:
        (marks / str(os.getpid())).touch()
        if len(list(marks.iterdir())) < 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return process(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline, "clean_unit", dies_once)
    prepare(settings(tmp_path / "out", corpus), workers=2, progress=False)
    assert len(list(marks.iterdir())) >= 3
    assert hashes(tmp_path / "out") == hashes(prepared[0])


def test_a_second_run_re_uses_everything(
    prepared: Prepared, corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, made = prepared
    no_ray(monkeypatch)
    before = {path: path.stat().st_mtime_ns for path in directory.iterdir() if path.name != ".lock"}
    assert prepare(settings(directory, corpus)) == made
    # Rows and their order are the loader's: they do not make another data set.
    assert prepare(settings(directory, corpus, sequence_length=32, seed=9), progress=False) == made
    assert prepare(settings(directory, corpus, carry_rows=4), progress=False) == made
    assert before == {path: path.stat().st_mtime_ns for path in directory.iterdir() if path.name != ".lock"}
    assert f"re-using the data set in {directory}" in capsys.readouterr().err


@pytest.mark.parametrize("lost", ["train-00000.bin", "validation-00000.idx", "manifest.json", "report.html"])
def test_a_lost_file_is_made_again_from_the_units(
    prepared: Prepared,
    corpus: Path,
    tmp_path: Path,
    lost: str,
    monkeypatch: pytest.MonkeyPatch,
    ray_cluster: object,
) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(prepared[0], directory)
    no_units(monkeypatch)
    (directory / lost).unlink()
    assert len(verify_dataset(directory)) == (lost != "report.html")
    prepare(settings(directory, corpus), progress=False)
    assert hashes(directory) == hashes(prepared[0])


def test_a_damaged_unit_is_made_again(
    prepared: Prepared, corpus: Path, tmp_path: Path, ray_cluster: object
) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(prepared[0], directory)
    for stage, name in (("tokens", "train.tokens"), ("clean", "text.zst")):
        damaged = sorted((directory / "work" / stage).iterdir())[0] / name
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    (directory / "train-00000.bin").unlink()
    prepare(settings(directory, corpus), workers=1, progress=False)
    assert hashes(directory) == hashes(prepared[0])


def test_a_changed_config_or_corpus_makes_a_new_manifest_and_re_uses_units(
    prepared: Prepared, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_cluster: object
) -> None:
    directory, text = tmp_path / "copy", tmp_path / "text"
    shutil.copytree(prepared[0], directory)
    shutil.copytree(corpus, text)
    model = TokenizerConfig(path=str(prepared[0] / "tokenizer.model"))
    config = settings(directory, text, tokenizer=model)
    with monkeypatch.context() as patch:
        no_units(patch)
        made = prepare(replace(config, shard_tokens=2000), progress=False)
    assert made.fingerprint != prepared[1].fingerprint
    assert len(made.splits["train"].shards) > 3
    assert documents(directory, "train") == documents(prepared[0], "train")
    before = committed(directory)
    (text / "a" / "z.txt").write_text(prose(99))
    grown = prepare(config, workers=1, progress=False)
    assert sum(split.documents for split in grown.splits.values()) == 61
    assert len(committed(directory) - before) == 2  # clean and tokens
    assert sorted(path.name for path in directory.glob("train-*.bin")) == ["train-00000.bin"]


def test_a_vanished_corpus_does_not_unmake_the_data_set(
    prepared: Prepared, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(corpus, tmp_path / "text")
    no_ray(monkeypatch)
    directory = tmp_path / "copy"
    shutil.copytree(prepared[0], directory)
    config = settings(directory, tmp_path / "text")
    made = load_manifest(directory)
    manifest.write_manifest(directory, replace(made, source=describe(config.source)))
    shutil.rmtree(tmp_path / "text")
    assert prepare(config, progress=False).splits == made.splits
    with pytest.raises(ValueError, match="elsewhere' does not exist"):
        prepare(settings(directory, tmp_path / "elsewhere"), progress=False)


def test_a_moved_corpus_with_its_licence_named_is_the_same_data_set(
    prepared: Prepared, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, text = tmp_path / "copy", tmp_path / "text"
    shutil.copytree(prepared[0], directory)
    shutil.copytree(corpus, text)
    source = SourceConfig(kind="path", path=str(text), licence="CC0-1.0")
    no_ray(monkeypatch)
    made = prepare(settings(directory, text, source=source), progress=False)
    assert (made.fingerprint, made.splits) == (prepared[1].fingerprint, prepared[1].splits)
    assert (made.source["licence"], made.source["path"]) == ("CC0-1.0", str(text))


def test_an_edit_that_keeps_the_size_is_seen_and_a_touch_makes_no_unit(
    prepared: Prepared, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_cluster: object
) -> None:
    directory, text = tmp_path / "copy", tmp_path / "text"
    shutil.copytree(prepared[0], directory)
    shutil.copytree(corpus, text)
    model = TokenizerConfig(path=str(prepared[0] / "tokenizer.model"))
    config = settings(directory, text, tokenizer=model)
    with monkeypatch.context() as patch:
        no_units(patch)
        first = prepare(config, progress=False)
        (text / "a" / "1.txt").touch()
        assert prepare(config, progress=False).fingerprint == first.fingerprint
    before = committed(directory)
    edited = prose(1).replace("w", "W", 1)
    (text / "a" / "1.txt").write_text(edited)
    made = prepare(config, workers=1, progress=False)
    assert made.fingerprint != first.fingerprint
    assert edited in documents(directory, "train") + documents(directory, "validation")
    assert len(committed(directory) - before) == 2  # clean and tokens


def test_what_killed_runs_left_half_written_goes(
    prepared: Prepared, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(prepared[0], directory)
    litter = [
        directory / ".train-00000.bin.17-0123abcd.tmp",
        directory / "work/plans/.a.json.1-00000000.tmp",
    ]
    for path in litter:
        path.write_bytes(b"half")
    (directory / "manifest.json").unlink()
    no_ray(monkeypatch)
    prepare(settings(directory, corpus), progress=False)
    assert not any(path.exists() for path in litter)
    assert hashes(directory) == hashes(prepared[0])


def test_bad_records_are_counted_listed_and_do_not_stop_the_job(ray_cluster: object, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "bad.txt").write_bytes(b"\xff\xfe")
    lines = rows(range(20))
    (corpus / "rows.jsonl").write_text(lines[0] + "{not json\n" + "".join(lines[1:]))
    directory = tmp_path / "out"
    made = prepare(settings(directory, corpus), workers=1, progress=False)
    assert made.quarantined == 2
    listed = [json.loads(line) for line in (directory / "quarantine.jsonl").read_text().splitlines()]
    assert [(record["file"], record["offset"]) for record in listed] == [
        ("bad.txt", 0),
        ("rows.jsonl", len(lines[0])),
    ]
    assert sum(split.documents for split in made.splits.values()) == 20
    assert "bad.txt" in (directory / "report.html").read_text()


def test_max_documents_takes_the_first_in_corpus_order(
    ray_cluster: object, corpus: Path, tmp_path: Path
) -> None:
    source = SourceConfig(kind="path", path=str(corpus), max_documents=23)
    made = prepare(settings(tmp_path, corpus, source=source), workers=2, progress=False)
    assert sum(split.documents for split in made.splits.values()) == 23
    found = documents(tmp_path, "train") + documents(tmp_path, "validation")
    assert sorted(found) == sorted(prose(seed) for seed in range(10, 33))


def test_a_hugging_face_data_set_becomes_shards(ray_cluster: object, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for part in range(2):
        lines = rows(range(part * 30, part * 30 + 30))
        (tmp_path / "data" / f"part{part}.jsonl").write_text("".join(lines))
    source = SourceConfig(kind="huggingface", name=str(tmp_path / "data"), licence="CC0-1.0")
    config = settings(tmp_path / "out", tmp_path, source=source, validation_fraction=0.3)
    made = prepare(config, workers=2, progress=False)
    assert sum(split.documents for split in made.splits.values()) == 60
    assert made.source["licence"] == "CC0-1.0"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no text"),
        ({"a.txt": b"\xff"}, r"no document of the corpus could be read \(a.txt at 0: not UTF-8"),
        ({"a.txt": b"only one\n"}, "the corpus has 1 different document.*text_document_bytes"),
        ({"a.txt": b"the same\n", "b.txt": b"the same\r\n"}, "the corpus has 1 different document"),
        ({"a.txt": b"too small\n", "b.txt": b"for this\n"}, "vocab_size = 400 cannot be trained"),
    ],
)
def test_a_corpus_that_cannot_serve_is_one_line(
    tmp_path: Path, files: dict[str, bytes], message: str
) -> None:
    (tmp_path / "corpus").mkdir()
    for name, data in files.items():
        (tmp_path / "corpus" / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        prepare(settings(tmp_path / "out", tmp_path / "corpus"), progress=False)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_few_long_documents_still_hold_one_out(ray_cluster: object, tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    for seed in range(4):
        (tmp_path / "corpus" / f"{seed}.txt").write_text(prose(seed, words=2000))
    config = settings(tmp_path / "out", tmp_path / "corpus", validation_fraction=1e-6)
    made = prepare(config, workers=2, progress=False)
    assert made.splits["validation"].documents == 1
    assert made.splits["train"].documents == 3


def test_an_error_of_a_worker_arrives_as_itself(
    ray_cluster: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "corpus").mkdir()
    for seed in range(4):
        (tmp_path / "corpus" / f"{seed}.txt").write_text(prose(seed))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    config = settings(tmp_path / "out", tmp_path / "corpus")
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "clean_unit", full)
        with pytest.raises(OSError, match="No space left on device") as error:
            prepare(config, workers=1, progress=False)
    assert "\n" not in str(error.value)
    assert prepare(config, workers=1, progress=False).quarantined == 0


def test_two_jobs_do_not_write_one_data_set(prepared: Prepared, corpus: Path, tmp_path: Path) -> None:
    code = """
        import fcntl, sys, time
        file = open(sys.argv[1], "a")
        fcntl.flock(file, fcntl.LOCK_EX)
        print("locked", flush=True)
        time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(ValueError, match="another job is preparing"):
            prepare(settings(tmp_path, corpus), progress=False)
        os.kill(other.pid, signal.SIGKILL)


def test_a_given_tokenizer_that_is_missing_is_named(corpus: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, corpus, tokenizer=TokenizerConfig(path=str(tmp_path / "none.model")))
    with pytest.raises(ValueError, match=r"none\.model' does not exist"):
        prepare(config, progress=False)


def test_a_data_set_inside_its_corpus_is_refused(corpus: Path) -> None:
    with pytest.raises(ValueError, match=r"lies inside the corpus .*choose a folder outside it"):
        prepare(settings(corpus / "out", corpus), progress=False)
    assert not (corpus / "out").exists()


def test_a_given_tokenizer_is_not_needed_again_but_another_name_is_no_stand_in(
    prepared: Prepared, corpus: Path, tmp_path: Path, ray_cluster: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "given.model"
    shutil.copy(prepared[0] / "tokenizer.model", model)
    config = settings(tmp_path / "out", corpus, tokenizer=TokenizerConfig(path=str(model)))
    made = prepare(config, workers=2, progress=False)
    model.unlink()
    no_ray(monkeypatch)
    assert prepare(config, progress=False) == made
    misspelt = replace(config, tokenizer=TokenizerConfig(path=str(tmp_path / "givn.model")))
    with pytest.raises(ValueError, match=r"givn\.model' does not exist"):
        prepare(misspelt, progress=False)

"""What sharing a question's prompt saves, against scoring every choice apart, and memory of long needles.

    python -m benchmarks.evals --rows DIR --work DIR    writes benchmarks/results/evals.json, 15 minutes
    python -m benchmarks.evals --show                   its tables, as docs/evaluation.md has them

Multiple choice: real questions, one model with random weights. The same scorer reads each prompt once
("shared") or once per choice ("apart": the same batches, the same code), and lm-evaluation-harness's Hugging
Face backend scores the same requests with the same weights, exported. Rounds of all three are interleaved.
What sharing can save at most is the ratio of the tokens read; the speed-up is compared with it.

Needles: peak memory of a process above the loaded model while it reads and answers one prompt of a length.
Each length is a process of its own, and its peak is reset (Linux) once the model is loaded.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine, versions
from checkpoints.hf_export import export_for_transformers
from checkpoints.logical import LogicalTensor
from checkpoints.state import save_checkpoint
from data_pipeline.config import TokenizerConfig
from data_pipeline.tokenizer import Tokenizer, train_tokenizer
from evals.ruler.catalogue import RULER
from evals.scorer import Scorer
from evals.suites.catalogue import SUITES
from evals.suites.question import Question
from evals.suites.rows import read_questions
from evals.tasks.ruler import score_questions
from trellis_dist.files import read_json, write_json
from trellis_dist.models.config import ModelConfig, TrellisConfig
from trellis_dist.models.language_model import LanguageModel, build_language_model

RESULT = Path(__file__).parent / "results" / "evals.json"
CHOICE_SUITES = ("hellaswag", "piqa", "arc_easy", "siqa")
QUESTIONS, ROUNDS, BATCH = 300, 3, 64
LENGTHS = (8192, 65536)
VOCABULARY = 4096


def model_config() -> ModelConfig:
    """4 layers of width 512, 8 heads with memories of 64 slots, chunks of 64 tokens."""
    trellis = TrellisConfig(slots=64, chunk_size=64)
    return ModelConfig(vocab_size=VOCABULARY, num_layers=4, dim=512, num_heads=8, trellis=trellis)


def build() -> LanguageModel:
    """Random weights, fp32."""
    return build_language_model(model_config(), seed=0).eval()


def read_suites(rows: Path, limit: int) -> dict[str, list[Question]]:
    """The first questions of each suite."""
    return {name: read_questions(rows, SUITES[name], limit=limit) for name in CHOICE_SUITES}


def make_tokenizer(rows: Path, path: Path) -> Tokenizer:
    """A SentencePiece model of the text of all questions; one that is there is used again."""
    if not path.is_file():
        suites = read_suites(rows, 0)
        texts = [before + after for found in suites.values() for q in found for before, after in q.requests]
        path.write_bytes(train_tokenizer(TokenizerConfig(vocab_size=VOCABULARY, threads=1), texts))
    return Tokenizer.load(path)


def export(model: LanguageModel, tokenizer: Path, work: Path) -> Path:
    """The model as a folder for transformers."""
    folder = work / "exported"
    if not folder.is_dir():
        tensors = [LogicalTensor.whole(f"model/{n}", p.detach()) for n, p in model.named_parameters()]
        saved = save_checkpoint(work / "checkpoints", step=1, tensors=tensors, run_state={"step": 1})
        codec, section = Tokenizer.load(tokenizer), asdict(model_config())
        export_for_transformers(
            saved,
            folder,
            tokenizer=tokenizer,
            model_config=section,
            bos_id=codec.bos_id,
            eos_id=codec.eos_id,
        )
    return folder


class Ways:
    """Three ways to score the same requests; each returns log-likelihoods by request."""

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, folder: Path) -> None:
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM

        import data_pipeline.huggingface  # noqa: F401

        self._scorer, self._instance = Scorer(model, tokenizer, max_rows=BATCH), Instance
        self._peer = HFLM(pretrained=str(folder), batch_size=BATCH, device="cpu", dtype="float32")

    def pairs(self, questions: Sequence[Question]) -> list[tuple[str, str]]:
        """Every request of every question."""
        return [request for question in questions for request in question.requests]

    def encoded(self, questions: Sequence[Question]) -> list[tuple[list[int], list[int]]]:
        """Token ids of every request."""
        return [self._scorer.encode_pair(*pair) for pair in self.pairs(questions)]

    def shared(self, questions: Sequence[Question]) -> list[float]:
        """Each prompt is read once."""
        return [score.log_prob for score in self._scorer.log_likelihoods(self.pairs(questions))]

    def apart(self, questions: Sequence[Question]) -> list[float]:
        """Each prompt is read once per choice, in batches of the same rows."""
        pairs = self.encoded(questions)
        scored = self._scorer.score([before for before, _ in pairs], [[after] for _, after in pairs])
        return [scores[0].log_prob for scores in scored]

    def harness(self, questions: Sequence[Question]) -> list[float]:
        """lm-evaluation-harness's own backend, on the exported model."""
        made = [
            self._instance("loglikelihood", doc={}, arguments=pair, idx=i)
            for i, pair in enumerate(self.pairs(questions))
        ]
        return [found[0] for found in self._peer.loglikelihood(made, disable_tqdm=True)]


def compare(ways: Ways, questions: Sequence[Question], rounds: int) -> dict[str, Any]:
    """Seconds of each way (medians of interleaved rounds), tokens, and how far the numbers agree."""
    kinds: dict[str, Callable[[Sequence[Question]], list[float]]] = {
        "shared": ways.shared,
        "apart": ways.apart,
        "harness": ways.harness,
    }
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    found = {name: way(questions) for name, way in kinds.items()}  # warm
    for _ in range(rounds):
        for name, way in kinds.items():
            began = time.perf_counter()
            way(questions)
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(all_) for name, all_ in seconds.items()}
    tokens = count_tokens(ways, questions)
    speedup = statistics.median(a / s for a, s in zip(seconds["apart"], seconds["shared"]))
    ratio = tokens["apart"] / tokens["shared"]
    return {
        "questions": len(questions),
        "requests": len(found["shared"]),
        "tokens": tokens,
        "token_ratio": ratio,
        "seconds": medians,
        "spread": {name: [min(all_), max(all_)] for name, all_ in seconds.items()},
        "speedup": speedup,
        "share_of_ratio": speedup / ratio,
        "speedup_over_harness": statistics.median(
            h / s for h, s in zip(seconds["harness"], seconds["shared"])
        ),
        "largest_difference": {
            name: max(abs(a - b) for a, b in zip(found["shared"], found[name]))
            for name in ("apart", "harness")
        },
    }


def count_tokens(ways: Ways, questions: Sequence[Question]) -> dict[str, int]:
    """Tokens read with each prompt once, and with each prompt once per choice; no padding."""
    pairs, shared = ways.encoded(questions), 0
    apart = sum(len(before) + len(after) for before, after in pairs)
    place = 0
    for question in questions:
        own = pairs[place : place + len(question.requests)]
        place += len(own)
        prompts = {tuple(before) for before, _ in own}
        shared += sum(map(len, prompts)) + sum(len(after) for _, after in own)
    return {"shared": shared, "apart": apart}


def needle_peak(tokenizer: Path, length: int) -> dict[str, float]:
    """MiB above the loaded model while one needle prompt is read and answered (in this process)."""
    model, codec, task = build(), Tokenizer.load(tokenizer), RULER["niah_single_1"]
    scorer = Scorer(model, codec)
    question = task.questions("")(seed=1, length=length, index=0, encode=codec.encode)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed meanwhile would hide what scoring takes
    Path("/proc/self/clear_refs").write_text("5")
    before, began = _status("VmRSS"), time.perf_counter()
    score_questions(scorer, [question], answer_tokens=task.answer_tokens)
    return {
        "length": length,
        "prompt_tokens": len(question.ids),
        "loaded_mib": before,
        "peak_above_mib": _status("VmHWM") - before,
        "seconds": time.perf_counter() - began,
    }


def _status(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {name}: this measurement needs Linux")


def _peak_of_a_process(tokenizer: Path, length: int) -> dict[str, float]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.evals",
        "--needle",
        str(length),
        "--tokenizer",
        str(tokenizer),
    ]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"the process for {length} tokens failed: {ran.stderr[-2000:]}")
    found: dict[str, float] = json.loads(ran.stdout.splitlines()[-1])
    return found


def render(found: dict[str, Any]) -> str:
    """Both tables."""
    lines = [
        "| suite | questions | tokens apart / shared | time apart / shared | share of it "
        "| time of the harness's backend / shared |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, row in found["choices"].items():
        lines.append(
            f"| {name} | {row['questions']} | {row['token_ratio']:.2f} | {row['speedup']:.2f} "
            f"| {row['share_of_ratio']:.2f} | {row['speedup_over_harness']:.2f} |"
        )
    lines += ["", "| prompt tokens | model loaded | peak above it |", "|--:|--:|--:|"]
    for row in found["needles"]:
        lines.append(
            f"| {row['prompt_tokens']:,} | {row['loaded_mib']:,.0f} MiB | {row['peak_above_mib']:,.0f} MiB |"
        )
    return "\n".join(lines)


def measure(rows: Path, work: Path, *, limit: int, rounds: int, lengths: Sequence[int]) -> dict[str, Any]:
    """Everything."""
    work.mkdir(parents=True, exist_ok=True)
    suites = read_suites(rows, limit)
    path = work / "tokenizer.model"
    tokenizer, model = make_tokenizer(rows, path), build()
    ways = Ways(model, tokenizer, export(model, path, work))
    choices = {}
    for name, questions in suites.items():
        choices[name] = compare(ways, questions, rounds)
        print(json.dumps({name: choices[name]}), flush=True)
    return {
        "machine": machine(),
        "versions": versions() | {"lm-eval": _version("lm_eval"), "transformers": _version("transformers")},
        "threads": torch.get_num_threads(),
        "model": "4 layers, dim 512, 8 heads, 64 slots, chunks of 64, fp32, random weights",
        "parameters": sum(p.numel() for p in model.parameters()),
        "rounds": rounds,
        "batch": BATCH,
        "choices": choices,
        "needles": [_peak_of_a_process(path, length) for length in lengths],
    }


def _version(name: str) -> str:
    import importlib.metadata

    return importlib.metadata.version(name)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, or show what was measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evals", description=__doc__)
    parser.add_argument("--show", action="store_true", help="print the tables of the last result")
    parser.add_argument("--rows", type=Path, help="folder with hellaswag.jsonl, piqa.jsonl, ...")
    parser.add_argument("--work", type=Path, help="tokenizer and exported model go here")
    parser.add_argument("--questions", type=int, default=QUESTIONS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--needle", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--tokenizer", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.show:
        print(render(read_json(options.output)))
    elif options.needle:
        print(json.dumps(needle_peak(options.tokenizer, options.needle)))
    elif options.rows is None or options.work is None:
        parser.error("give --rows and --work")
    else:
        found = measure(
            options.rows,
            options.work,
            limit=options.questions,
            rounds=options.rounds,
            lengths=options.lengths,
        )
        write_json(options.output, found)
        print(render(found))


if __name__ == "__main__":
    main()

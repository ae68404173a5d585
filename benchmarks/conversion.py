"""A Trellis that starts from a Llama against one from nothing, at equal tokens of Trellis training.

    python -m benchmarks.conversion --books DIR     writes benchmarks/results/conversion.json, 10 minutes
    python -m benchmarks.conversion --show          its table, as docs/export.md has it

A small Llama (transformers' own class) is trained on novels and saved, the code behind `trellis import
--from-transformer` turns it into a Trellis, and that is trained on beside a Trellis with fresh weights: the
same section, the same rows in the same order, the same optimizer. Both are scored on a novel that nobody has
read. What is there already under --work is used again, so a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.machine import machine, versions
from checkpoints.from_llama import convert_llama, llama_section
from checkpoints.source_folder import checked_section
from data_pipeline.config import TokenizerConfig
from data_pipeline.tokenizer import Tokenizer, train_tokenizer
from trellis_dist.files import read_json, write_json
from trellis_dist.models.language_model import LanguageModel, build_language_model

RESULT = Path(__file__).parent / "results" / "conversion.json"
HELD_OUT = "Middlemarch_145.txt"
VOCABULARY, LENGTH, ROWS, HELD_OUT_ROWS = 1024, 128, 8, 64
# Heads in pairs share keys and values: what is converted has grouped queries, as Llamas have.
LLAMA = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2}
TRELLIS = {"slots": 32, "chunk_size": 32}
PEAK, WARMUP = 3e-3, 20
# Between the two: what is gained without the mixers' projections (and identity convolutions).
PARTLY = "all but mixers"
STARTS = ("scratch", PARTLY, "converted")


class Text:
    """Tokens of the novels, and of the one that is held out with its bytes."""

    def __init__(self, books: Path, work: Path) -> None:
        """Reads all, and trains the tokenizer unless `work` has it."""
        texts = {path.name: path.read_text(encoding="utf-8") for path in sorted(books.glob("*.txt"))}
        held_out = texts.pop(HELD_OUT)
        model = work / "tokenizer.model"
        if not model.is_file():
            options = TokenizerConfig(vocab_size=VOCABULARY, sample_bytes=2**21, threads=1)
            model.write_bytes(train_tokenizer(options, texts.values()))
        tokenizer = Tokenizer.load(model)
        self.train = torch.from_numpy(tokenizer.encode_array("\n".join(texts.values()))).long()
        ids = torch.from_numpy(tokenizer.encode_array(held_out)).long()
        self.held_out = _rows(ids, torch.arange(HELD_OUT_ROWS) * ((len(ids) - LENGTH - 1) // HELD_OUT_ROWS))
        self.bytes = len(tokenizer.decode(self.held_out[:, 1:].flatten().tolist()).encode())

    def batches(self, seed: int, steps: int) -> Iterator[Tensor]:
        """[ROWS, LENGTH + 1] tokens at places drawn from `seed` alone."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            yield _rows(self.train, torch.randint(len(self.train) - LENGTH - 1, (ROWS,), generator=generator))


def _rows(ids: Tensor, starts: Tensor) -> Tensor:
    return ids[starts[:, None] + torch.arange(LENGTH + 1)]


def nats(model: nn.Module, rows: Tensor) -> Tensor:
    """Sum of the token losses of [B, T + 1] tokens, for either kind of model."""
    tokens, labels = rows[:, :-1], rows[:, 1:].contiguous()
    if isinstance(model, LanguageModel):
        return model.loss_sum(tokens, labels)
    logits = model(tokens).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


@torch.no_grad()
def bits_per_byte(model: nn.Module, text: Text) -> float:
    """Of the held-out rows, each read from nothing."""
    total = sum(float(nats(model, rows)) for rows in text.held_out.split(ROWS))
    return total / math.log(2) / text.bytes


def train(
    model: nn.Module, text: Text, *, seed: int, steps: int, scored: Sequence[int] = ()
) -> dict[str, float]:
    """AdamW with warmup and a cosine to a tenth; bits per byte after each of the steps `scored`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, weight_decay=0.0, betas=(0.9, 0.95))
    found = {}
    if 0 in scored:
        found["0"] = round(bits_per_byte(model, text), 4)
    for number, rows in enumerate(text.batches(seed, steps), start=1):
        rate = learning_rate(number, steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = nats(model, rows) / (ROWS * LENGTH)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if number in scored:
            found[str(number)] = round(bits_per_byte(model, text), 4)
    return found


def learning_rate(number: int, steps: int) -> float:
    """Of step `number`, from 1: linear warmup, then a cosine from PEAK to a tenth of it."""
    if number <= WARMUP:
        return PEAK * number / WARMUP
    progress = (number - WARMUP) / max(1, steps - WARMUP)
    return PEAK * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def trained_llama(text: Text, work: Path, steps: int) -> dict[str, Any]:
    """The Llama in work/llama, trained unless it is there, and what is to be said of it."""
    folder, record = work / "llama", work / "llama.json"
    if record.is_file():
        found: dict[str, Any] = read_json(record)
        return found
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=True, **LLAMA)
    model = LlamaForCausalLM(config)
    begin = time.perf_counter()
    scores = train(model, text, seed=1000, steps=steps, scored=[steps])
    seconds = time.perf_counter() - begin
    model.save_pretrained(folder)
    found = {"steps": steps, "bits_per_byte": scores[str(steps)], "seconds": round(seconds, 1)}
    found["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    write_json(record, found)
    return found


def started(start: str, folder: Path, *, seed: int) -> tuple[LanguageModel, list[int]]:
    """The Trellis before its first step, and how many of its tensors came from the Llama, and did not."""
    section = {**llama_section(folder), "trellis": TRELLIS}
    model = build_language_model(checked_section(section, source="benchmark"), seed=seed)
    taken: set[str] = set()
    if start != "scratch":
        imported = convert_llama(folder, section, seed=seed)
        taken = {name for name in imported.mapped if start == "converted" or ".mixer." not in name}
        kept = taken | (set(imported.fresh) if start == "converted" else set())
        model.load_state_dict({name: imported.tensors[name] for name in kept}, strict=False)
    return model, [len(taken), len(list(model.parameters())) - len(taken)]


def measure(
    text: Text, work: Path, *, seeds: Sequence[int], steps: int, scored: Sequence[int]
) -> dict[str, Any]:
    """Every start for each seed, in turns."""
    found: dict[str, Any] = {start: {} for start in STARTS}
    for seed in seeds:
        for start in STARTS:
            record = work / f"{start.replace(' ', '-')}-{seed}-{steps}.json"
            if not record.is_file():
                model, counts = started(start, work / "llama", seed=seed)
                scores = train(model, text, seed=seed, steps=steps, scored=scored)
                write_json(record, {"bits_per_byte": scores, "tensors taken over, fresh": counts})
            found[start][str(seed)] = read_json(record)
            print(f"seed {seed}, {start}: {found[start][str(seed)]}", flush=True)
    return found


def summary(runs: dict[str, Any], scored: Sequence[int]) -> dict[str, Any]:
    """Mean bits per byte of every start by step, and at which scored step the converted one is as good as
    the other at its end (None: never)."""
    means: dict[str, dict[str, float]] = {}
    for start in STARTS:
        scores = [run["bits_per_byte"] for run in runs[start].values()]
        means[start] = {
            str(step): round(statistics.mean(score[str(step)] for score in scores), 4) for step in scored
        }
    goal = means["scratch"][str(scored[-1])]
    reached = [step for step in scored if means["converted"][str(step)] <= goal]
    wins = sum(
        runs["converted"][seed]["bits_per_byte"][str(scored[-1])] < run["bits_per_byte"][str(scored[-1])]
        for seed, run in runs["scratch"].items()
    )
    return {"bits_per_byte": means, "steps_to_scratch": min(reached, default=None), "wins": wins}


def table(found: dict[str, Any]) -> str:
    """The result as Markdown."""
    tokens = [f"{step * found['tokens_per_step'] / 1000:.0f}k" for step in found["scored"]]
    lines = [
        "| bits per byte after tokens of Trellis training | " + " | ".join(tokens) + " |",
        "|---" * (len(tokens) + 1) + "|",
    ]
    for start in STARTS:
        means = found["summary"]["bits_per_byte"][start]
        cells = [f"{means[str(step)]:.3f}" for step in found["scored"]]
        lines.append(f"| {start} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, convert, compare, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--books", type=Path, help="folder of .txt documents, Middlemarch among them")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks/conversion"))
    parser.add_argument("--show", action="store_true", help="print the table of the result there is")
    parser.add_argument("--llama-steps", type=int, default=800)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    if options.show:
        print(table(read_json(options.output)))
        return
    if options.books is None:
        parser.error("give --books")
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    text = Text(options.books, options.work)
    llama = trained_llama(text, options.work, options.llama_steps)
    print(f"Llama: {llama}", flush=True)
    scored = sorted({0, *(options.steps * part // 8 for part in (1, 2, 4, 8))})
    runs = measure(text, options.work, seeds=options.seeds, steps=options.steps, scored=scored)
    used = versions() | {"transformers": importlib.metadata.version("transformers")}
    found = {"machine": machine(), "versions": used, "llama": llama, "scored": scored}
    found |= {"tokens_per_step": ROWS * LENGTH, "peak_lr": PEAK, "section": TRELLIS, "held_out": HELD_OUT}
    found |= {"summary": summary(runs, scored), "runs": runs}
    options.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()

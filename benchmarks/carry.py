"""Rows that carry states: what a step costs, and what a model trained so does beyond the length of a row.

    python -m benchmarks.carry --books DIR --work DIR     writes benchmarks/results/carry.json, 12 minutes
    python -m benchmarks.carry --show                     its table, as docs/data.md has it

The same small model is trained on the same novels at T = 128, with every row anew and with states carried
through 16 rows; then both read windows of 4096 tokens of a novel that was held out, with their state. Small
and short: it tells whether carrying works beyond a row, no more.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.machine import machine, versions
from data_pipeline.config import DataConfig, SourceConfig, TokenizerConfig
from data_pipeline.job import prepare
from data_pipeline.loader import Batch, BatchLoader, TokenDataset
from trellis_dist.files import read_json
from trellis_dist.models.config import ModelConfig, TrellisConfig
from trellis_dist.models.language_model import LanguageModel, build_language_model
from trellis_dist.parallel.config import MeshConfig
from trellis_dist.parallel.mesh import Mesh, build_mesh
from trellis_dist.parallel.segments import Segments
from trellis_dist.training.carry import RowStates
from trellis_dist.training.config import OptimizerConfig, ScheduleConfig, TrainingConfig
from trellis_dist.training.engines.base import Engine
from trellis_dist.training.engines.factory import build_engine
from trellis_dist.training.schedule import learning_rate

RESULT = Path(__file__).parent / "results" / "carry.json"
LENGTH, ROWS, VOCABULARY = 128, 16, 4096
RUNS = (1, 16)
WINDOW, WINDOWS = 4096, 12
# Positions of a window: inside the first row, as far as states are carried in training, and beyond that.
SPANS = ((0, 128), (128, 2048), (2048, 4096))
OPTIMIZER = OptimizerConfig(lr=3e-3, weight_decay=0.0)
SCHEDULE = ScheduleConfig(warmup_steps=50)


def model_config() -> ModelConfig:
    """2 layers of width 128, 4 heads with memories of 32 slots, chunks of 32 tokens."""
    trellis = TrellisConfig(slots=32, chunk_size=32)
    return ModelConfig(vocab_size=VOCABULARY, num_layers=2, dim=128, num_heads=4, trellis=trellis)


def prepared(books: Path, work: Path) -> Path:
    """The novels as one document each, tokenised; what is there already is used again."""
    config = DataConfig(
        directory=str(work / "books"),
        sequence_length=LENGTH,
        source=SourceConfig(kind="path", path=str(books), strip_gutenberg=True),
        tokenizer=TokenizerConfig(vocab_size=VOCABULARY, sample_bytes=2**22),
    )
    prepare(config, workers=2, progress=False)
    return Path(config.directory)


class Trainer:
    """One model on the rows of one order."""

    def __init__(self, data: Path, *, carry_rows: int, seed: int, steps: int) -> None:
        rows = TokenDataset(data, "train", sequence_length=LENGTH, seed=seed, carry_rows=carry_rows)
        self._loader = BatchLoader(rows, global_batch=ROWS, micro_batch=ROWS)
        self._steps = steps
        self.model = build_language_model(model_config(), seed=seed)
        training = TrainingConfig(
            steps=steps, global_batch_tokens=ROWS * LENGTH, micro_batch=ROWS, engine="local", precision="fp32"
        )
        self.engine = _engine(self.model, training, carried=carry_rows > 1)

    def step(self, number: int) -> float:
        """Seconds of the optimizer step ``number``, from 0; the batch is made before."""
        batches: list[Batch] = self._loader.micro_batches(number * ROWS)
        rate = learning_rate(number + 1, peak=OPTIMIZER.lr, steps=self._steps, schedule=SCHEDULE)
        begin = time.perf_counter()
        result = self.engine.train_step(batches, lr=rate, valid_tokens=batches[0].valid_tokens)
        assert result.applied, f"step {number}: {result}"
        return time.perf_counter() - begin


def _engine(model: LanguageModel, training: TrainingConfig, *, carried: bool) -> Engine:
    mesh: Mesh = build_mesh(MeshConfig())
    states = RowStates(global_rows=ROWS, micro_batch=ROWS, mesh=mesh) if carried else None
    segments = Segments(mesh, chunk_size=model.config.trellis.chunk_size)
    return build_engine(model, training, optimizer=OPTIMIZER, mesh=mesh, segments=segments, states=states)


def step_times(data: Path, steps: int) -> dict[str, Any]:
    """Milliseconds of a step for both, in turns, and their ratio round by round."""
    trainers = [Trainer(data, carry_rows=rows, seed=0, steps=steps) for rows in RUNS]
    rounds = [[trainer.step(number) for trainer in trainers] for number in range(steps)][5:]
    found = {
        f"carry_rows {rows}": [round(1e3 * value, 2) for value in _spread(times)]
        for rows, times in zip(RUNS, zip(*rounds, strict=True), strict=True)
    }
    ratios = _spread([carried / anew for anew, carried in rounds])
    return {"rounds": len(rounds), "ms": found, "ratio": [round(value, 3) for value in ratios]}


def _spread(values: Sequence[float]) -> list[float]:
    """Tenth percentile, median, ninetieth percentile."""
    deciles = statistics.quantiles(values, n=10)
    return [deciles[0], statistics.median(values), deciles[-1]]


@torch.no_grad()
def nats_by_span(model: LanguageModel, data: Path) -> dict[str, float]:
    """Mean loss by position in windows spread over the held-out novel, read with states from their start."""
    held_out = TokenDataset(data, "validation", sequence_length=LENGTH, seed=0, verify=False)
    longest = max((held_out.tokens_of(i) for i in range(held_out.num_documents)), key=len)
    firsts = [i * (len(longest) - WINDOW - 1) // (WINDOWS - 1) for i in range(WINDOWS)]
    text = torch.stack([torch.from_numpy(longest[first : first + WINDOW + 1]) for first in firsts])
    logits, _ = model.prefill(text[:, :-1], model.init_state(WINDOWS))
    nats = F.cross_entropy(logits.transpose(1, 2), text[:, 1:], reduction="none").mean(0)
    return {f"{begin}-{end}": round(float(nats[begin:end].mean()), 4) for begin, end in SPANS}


def measure(data: Path, *, carry_rows: int, seeds: Sequence[int], steps: int) -> dict[str, Any]:
    """Train once for each seed; nats per token by position in the windows."""
    runs = []
    for seed in seeds:
        trainer = Trainer(data, carry_rows=carry_rows, seed=seed, steps=steps)
        for number in range(steps):
            trainer.step(number)
        runs.append(nats_by_span(trainer.model, data))
        print(f"carry_rows {carry_rows}, seed {seed}: {runs[-1]}", flush=True)
    mean = {span: round(statistics.mean(run[span] for run in runs), 4) for span in runs[0]}
    return {"nats": mean, "nats_by_seed": runs}


def table(found: dict[str, Any]) -> str:
    """The result as Markdown."""
    spans = [f"{begin}-{end}" for begin, end in SPANS]
    lines = [
        "| " + " | ".join(["nats per token at position", *spans]) + " |",
        "|---" * (len(spans) + 1) + "|",
    ]
    for name, result in found["trained"].items():
        seeds = ([f"{run[span]:.2f}" for run in result["nats_by_seed"]] for span in spans)
        cells = [f"{result['nats'][span]:.2f} ({', '.join(each)})" for span, each in zip(spans, seeds)]
        lines.append("| " + " | ".join([f"`{name.replace(' ', ' = ')}`", *cells]) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure both and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--books", type=Path, help="folder of long .txt documents")
    parser.add_argument("--work", type=Path, help="where they are prepared")
    parser.add_argument("--show", action="store_true", help="print the table of the result there is")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    if options.show:
        print(table(read_json(options.output)))
        return
    if options.books is None or options.work is None:
        parser.error("give --books and --work")
    torch.set_num_threads(2)
    data = prepared(options.books, options.work)
    found: dict[str, Any] = {"machine": machine(), "versions": versions(), "steps": options.steps}
    found |= {"rows": ROWS, "length": LENGTH, "window": WINDOW, "windows": WINDOWS, "seeds": options.seeds}
    found["step"] = step_times(data, min(60, options.steps))
    print(f"a step with carried states takes {found['step']['ratio'][1]} times as long")
    found["trained"] = {
        f"carry_rows {rows}": measure(data, carry_rows=rows, seeds=options.seeds, steps=options.steps)
        for rows in RUNS
    }
    options.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

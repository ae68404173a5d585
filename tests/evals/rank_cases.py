"""What the ranks of tests/evals/test_ranks.py run; each case returns what the test compares."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from evals.config import EvalConfig
from evals.evaluate import evaluate_run, evaluate_subject
from evals.oracle import OracleModel
from evals.ranks import Ranks, current_ranks
from evals.runs import load_run
from evals.sampling import Sampling
from evals.scorer import Scorer
from tests.evals.fakes import ByteTokenizer, RecurrentModel
from trellis_dist.files import read_json
from trellis_dist.training.errors import EchoError

TOKENIZER = ByteTokenizer()
TEXTS = ["", "one", "a second text", "z" * 90, "A longer one, of which there is only one. " * 4, "three"]
REQUESTS = [(text, choice) for text in TEXTS for choice in (" yes", " no, not at all", "")]
CONFIG = EvalConfig(
    tasks=("perplexity", "context_length", "sample", "mqar"),
    context_lengths=(16, 200),
    context_documents=9,
    ngram_max_tokens=2000,
    mqar_pairs=(2,),
    mqar_length=(32,),
    mqar_samples=70,
    sample_tokens=6,
    device="cpu",
)


def scores(ranks=None):
    """Everything the scorer offers, and how many tokens this rank has read for it."""
    torch.set_num_threads(1)
    model, read = RecurrentModel(), 0
    prefill = model.prefill

    def counted(tokens, *rest, **options):
        nonlocal read
        read += tokens.numel()
        return prefill(tokens, *rest, **options)

    model.prefill = counted
    scorer = Scorer(model, TOKENIZER, max_rows=2, ranks=ranks)
    scorer.row_limit(1)  # every rank measures a state
    read = 0
    prompts = [[TOKENIZER.bos_id, *TOKENIZER.encode(text)] for text in TEXTS]
    sampling = Sampling(max_tokens=9, temperature=1.0, seed=4, stop=("a",))
    found = {
        "log_likelihoods": scorer.log_likelihoods(REQUESTS),
        "rolling": scorer.rolling(TEXTS),
        "generate": scorer.generate(prompts, sampling),
        "each": scorer.each(prompts, lambda prefix: [(len(rest), prefix.longest) for rest in prefix.rests]),
    }
    return found, read


def tasks(run_dir: str, output: str, text: str):
    """Results of tasks on a run, through a run's folder and through one of its own."""
    torch.set_num_threads(1)
    config = replace(CONFIG, perplexity_text=text)
    records = evaluate_run(Path(run_dir), config, progress=False)
    # Not `records`, whose seconds are each rank's own.
    stored = {name: read_json(Path(run_dir, "evals", f"{name}-step-7.json")) for name in records}
    again = evaluate_run(Path(run_dir), config, progress=False)
    assert {name: record["seconds"] for name, record in again.items()} != {}, "nothing was scored"
    elsewhere = evaluate_subject(load_run(Path(run_dir), device="cpu"), config, Path(output), progress=False)
    assert {name: record["result"] for name, record in elsewhere.items()} == {
        name: record["result"] for name, record in records.items()
    }
    files = sorted(path.name for path in [*Path(run_dir, "evals").iterdir(), *Path(output).iterdir()])
    return {name: record["result"] for name, record in records.items()}, files, again == stored


def writes():
    """How often each rank reaches the files that only rank 0 writes."""
    count = 0

    def write():
        nonlocal count
        count += 1
        return "written"

    return current_ranks().from_main(write), count


def fails(where: str):
    """Rank 1 (or every rank) fails in one way or another; then all go on together."""
    ranks = current_ranks()

    def piece(place):
        if where == "in a piece" and place == 1:
            raise ValueError(f"piece {place} is bad")
        if where == "unpicklable" and place == 1:
            return lambda: place
        return place

    def work():
        if where == "before the others' exchange" and ranks.rank == 1:
            raise ValueError("could not load")
        if where == "everywhere":
            raise ValueError("no such run")
        return ranks.divide(4, piece)

    try:
        ranks.together(work)
    except Exception as error:
        kind = "echo" if isinstance(error, EchoError) else type(error).__name__
        return f"{kind}: {error}", ranks.says(error), ranks.together(lambda: ranks.rank)
    return "no failure", None, None


def state_budget_differs():
    """Ranks that disagree about the batches are found out."""
    ranks = current_ranks()
    model = OracleModel([], vocab_size=TOKENIZER.vocab_size, eos_id=TOKENIZER.eos_id)
    scorer = Scorer(model, TOKENIZER, state_budget=8000 * (1 + ranks.rank))
    try:
        scorer.rolling(["x" * 900] * 4)
        scorer.each([[1] * 900] * 4, lambda prefix: [1] * len(prefix.rests))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "passed"


def alone():
    """The same scores without the group."""
    return scores(Ranks())

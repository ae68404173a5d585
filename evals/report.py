"""RUN/report.html: one self-contained page about a run, for a reader who has only the page."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evals.ruler.catalogue import RULER
from evals.runs import read_recipe
from evals.summary import read_metrics, read_results, summarise
from trellis_dist.files import atomic_write, read_json
from trellis_dist.models.config import ModelConfig
from trellis_dist.models.counts import parameter_counts
from trellis_dist.report import Report

__all__ = ["add_sections", "write_run_report"]

NEEDLE_TEXT = (
    "A value is hidden in a long text and asked for at its end (RULER, single needle). Generation counts "
    "when the output contains it; choice, when it is the most likely of ten values of the same form. "
    "The oracle row scores a program that copies the answer, through the same code."
)
RULER_TEXT = (
    "RULER: the score of a prompt is the share of the right answers that the output contains. The oracle row "
    "scores a program that knows the answers, through the same code."
)
MQAR_TEXT = (
    "Pairs of a key and a value (random tokens), then the keys again: the share of them after which the "
    "value is the most probable token of the whole vocabulary. The oracle row scores a program that looks "
    "it up."
)
LOSS_HEADER = ["", "bits per byte", "nats per token", "perplexity"]
SMALL_MODEL = 20_000_000
SMALL_MODEL_TEXT = (
    "A model this small ({:.1f} million parameters) is expected near chance on generation: it has not "
    "learned to copy."
)
DECODE_TEXT = (
    "Measured, one row at a time: what a token costs after so many tokens, and the state kept for it. "
    "The Trellis memory has one size; a key-value cache grows with every token."
)

Json = Mapping[str, Any]


def write_run_report(run_dir: Path) -> Path:
    """Write RUN/report.html from what the run folder holds, and return its path.

    Raises:
        ValueError: the folder is no run.
    """
    run_dir = Path(run_dir)
    recipe, results, metrics = read_recipe(run_dir), read_results(run_dir), read_metrics(run_dir)
    summary = _stored_summary(run_dir) | summarise(run_dir, {})
    report = Report(str(recipe.get("name", run_dir.name)), "What was trained, how it learned, what it scores")
    parameters = _parameters(recipe)
    facts = _facts(recipe, summary) | {"Parameters": f"{parameters:,}"} | _identity(results)
    report.facts(facts)
    _learning(report, metrics, results.get("perplexity"))
    add_sections(report, results, parameters=parameters)
    _seconds(report, summary, results)
    path = run_dir / "report.html"
    atomic_write(path, report.render())
    return path


def add_sections(report: Report, results: Mapping[str, Json], *, parameters: int | None = None) -> None:
    """A section for each task's record; ``parameters`` of the model, where they are known."""
    for name in [*_SECTIONS, *sorted(set(results) - set(_SECTIONS))]:
        if name not in results:
            continue
        result = results[name]["result"]
        if name in _SECTIONS:
            _SECTIONS[name](report, result)
        elif "groups" in result:
            _groups(report, name, result)
        else:
            continue
        if "step" in results[name]:  # of a run
            report.text(f"Scored at step {results[name]['step']:,}.")
        if name == "niah_single_1" and parameters is not None and parameters < SMALL_MODEL:
            report.text(SMALL_MODEL_TEXT.format(parameters / 1e6))


def _stored_summary(run_dir: Path) -> dict[str, Any]:
    """The seconds per stage, which only the summary knows."""
    path = run_dir / "summary.json"
    stored = read_json(path) if path.is_file() else {}
    return {key: value for key, value in stored.items() if key.startswith("seconds/")}


def _facts(recipe: Json, summary: Json) -> dict[str, str]:
    model, facts = recipe["model"], {}
    for label, key, form in (
        ("Held-out bits per byte", "validation/bits_per_byte", "{:.3f}"),
        ("Token bigram, bits per byte", "baseline/bigram_bits_per_byte", "{:.3f}"),
        ("Step", "step", "{:,}"),
        ("Last step trained", "step/train", "{:,}"),
        ("Tokens trained on", "tokens", "{:,}"),
        ("Tokens per second (median)", "perf/tokens_per_second", "{:,.0f}"),
    ):
        if key in summary and not (key == "step/train" and "step" in summary):
            facts[label] = form.format(summary[key])
    names = ("num_layers", "dim", "num_heads", "vocab_size")
    facts["Model"] = ", ".join(f"{name} {model[name]}" for name in names if name in model)
    facts["Tokens per row"] = str(recipe["data"].get("sequence_length", "-"))
    facts["ln V, the loss of a uniform guess"] = f"{math.log(model['vocab_size']):.3f}"
    return facts


def _parameters(recipe: Json) -> int:
    from pydantic import TypeAdapter

    return parameter_counts(TypeAdapter(ModelConfig).validate_python(recipe["model"])).total


def _identity(results: Mapping[str, Json]) -> dict[str, str]:
    """The corpus, where something was scored, and the Python that wrote the page."""
    scored = next(iter(results.values()), None)
    corpus = {"Corpus": scored["data"][:12]} if scored else {}
    return {**corpus, "Python": platform.python_version()}


def _learning(report: Report, metrics: list[dict[str, Any]], perplexity: Json | None) -> None:
    report.section("Learning")
    curves = {
        name: [(row["tokens"], row[key]) for row in metrics if key in row]
        for name, key in (("training", "loss/train"), ("held-out rows", "loss/validation"))
    }
    report.line_chart("Loss while training", curves, x_label="tokens", y_label="loss, nats per token")
    held_out = _held_out(metrics, perplexity) if perplexity else []
    if perplexity is None or len(held_out) < 2:
        return
    series = {"model": held_out}
    for name in ("bigram", "unigram"):
        level = perplexity["result"][name]["bits_per_byte"]
        series[name] = [(held_out[0][0], level), (held_out[-1][0], level)]
    report.line_chart("Held-out text while training", series, x_label="tokens", y_label="bits per byte")


def _held_out(metrics: list[dict[str, Any]], perplexity: Json) -> list[tuple[float, float]]:
    """(tokens, bits per byte of the whole split): while training, where it scored all of it, then the last.

    The loss of the first rows alone is not on the baselines' targets, and is left out.
    """
    points = {
        row["tokens"]: row["validation/bits_per_byte"] for row in metrics if "validation/bits_per_byte" in row
    }
    for row in metrics:
        if row["step"] == perplexity["step"]:
            points.setdefault(row["tokens"], perplexity["result"]["model"]["bits_per_byte"])
    return sorted(points.items())


def _perplexity(report: Report, result: Json) -> None:
    if "model" in result:  # of a run
        _held_out_losses(report, result)
    if "on_text" in result:
        _text_losses(report, result["on_text"])


def _text_losses(report: Report, result: Json) -> None:
    """Of a named text."""
    report.section("A named text")
    report.text(
        f"{result['documents']:,} documents, {result['bytes']:,} bytes, read in rows of {result['length']:,} "
        f"tokens ({result['targets']:,} tokens of this model's tokenizer, each scored once). Bits per byte "
        "can be compared between models of different tokenizers, nats per token and perplexity cannot."
    )
    if result["changed_documents"]:
        report.text(
            f"The tokenizer does not give {result['changed_documents']:,} documents back as they were: it "
            "had less to predict than their bytes, and its bits per byte look better than they are."
        )
    entries = (("this model", "model"), ("token bigram", "bigram"), ("unigram", "unigram"))
    rows = [[label, *_loss_cells(result[key])] for label, key in entries if key in result]
    rows.append([f"uniform (ln V = {result['ln_vocab']:.3f})", *_loss_cells(result["uniform"])])
    report.table(LOSS_HEADER, rows)
    _by_position(report, "Loss by tokens of context, named text", result)


def _held_out_losses(report: Report, result: Json) -> None:
    report.section("Held-out text")
    lower = {"kneser_ney": "Kneser-Ney", "unigram": "add-one unigram"}[result["bigram"]["lower_order"]]
    report.text(
        f"The whole validation split: {result['targets']:,} predicted tokens, {result['bytes']:,} bytes of "
        "text (whole documents held out; near-duplicates are not removed yet). The n-grams were counted on "
        f"{result['ngram_training_targets']:,} of {result['training_targets']:,} training tokens and "
        "scored on exactly the same targets; the bigram uses absolute "
        f"discounting over a {lower} lower order, the stronger of the two that were tried."
    )
    entries = (
        ("this model", "model"),
        ("token bigram", "bigram"),
        ("unigram", "unigram"),
        ("uniform", "uniform"),
    )
    rows = [[label, *_loss_cells(result[key])] for label, key in entries]
    rows[-1][0] = f"uniform (ln V = {result['ln_vocab']:.3f})"
    report.table(LOSS_HEADER, rows)
    _by_position(report, "Loss by tokens of context", result)


def _loss_cells(entry: Json) -> list[str]:
    return [f"{entry['bits_per_byte']:.3f}", f"{entry['loss']:.3f}", f"{math.exp(entry['loss']):,.1f}"]


def _ruler(report: Report, result: Json) -> None:
    ways = tuple(result["chance"])  # a single needle is scored in two
    report.section(f"{'A needle in a long text' if len(ways) > 1 else 'RULER'}: {result['title']}")
    report.text(NEEDLE_TEXT if len(ways) > 1 else RULER_TEXT)
    rows = [
        [f"{row['length']:,} tokens", row["samples"], *(_share(row[way]) for way in ways)]
        for row in result["rows"]
    ]
    rows.append(["chance", "", *(f"{result['chance'][way]:.0f}" for way in ways)])
    rows.append(["oracle", result["oracle"]["samples"], *(f"{result['oracle'][way]:.0f}" for way in ways)])
    names = {"generation": "generation, % (95% interval)", "choice": "choice among 10, % (95% interval)"}
    report.table(["", "prompts", *(names[way] for way in ways)], rows)


def _mqar(report: Report, result: Json) -> None:
    report.section("Recall of pairs")
    report.text(MQAR_TEXT)
    rows = [
        [f"{pairs} pairs in {length} tokens", part["samples"], _share(part)]
        for (pairs, length), part in ((group.split("/"), part) for group, part in result["groups"].items())
    ]
    rows += [[bound, "", f"{result[bound]:.2g}"] for bound in ("chance", "oracle")]
    report.table(["", "rows", "right, % (95% interval)"], rows)


def _share(share: Json) -> str:
    return f"{share['score']:.0f} ({share['low']:.0f}-{share['high']:.0f})"


def _context_length(report: Report, result: Json) -> None:
    if "rows" in result:  # of a run
        report.section("Loss by length of context")
        report.text(
            f"The same {result['targets']:,} held-out tokens, given more and more of the text before them "
            f"({_windows(result)}; the longest document has {result['longest_document']:,} tokens). The "
            f"model was trained on rows of {result['trained_length']:,} tokens."
        )
        _lengths(report, result)
    if "on_text" in result:
        on_text = result["on_text"]
        report.section("Loss by length of context, named text")
        report.text(
            f"The same {on_text['bytes']:,} bytes, given more and more tokens of the text before them "
            f"({_windows(on_text)}). Bits per byte can be compared between models of different tokenizers."
        )
        _lengths(report, on_text)


def _windows(result: Json) -> str:
    text = "windows in single documents" if result["text"] == "documents" else "documents put end to end"
    return f"{result['windows']} windows; {text}"


def _lengths(report: Report, result: Json) -> None:
    rows = [[f"{row['length']:,}", *_loss_cells(row)] for row in result["rows"]]
    report.table(["tokens of context", "bits per byte", "nats per token", "perplexity"], rows)
    _by_position(report, "Loss by position in the longest window", result)


def _by_position(report: Report, title: str, result: Json) -> None:
    points = [(max(part["from"], 1), part["loss"]) for part in result["by_position"]]
    report.line_chart(
        title, {"model": points}, x_label="tokens before the target", y_label="nats per token", log_x=True
    )


def _groups(report: Report, name: str, result: Json) -> None:
    """A task without a section of its own: its means."""
    report.section(name)
    rows = [[group, part["samples"], _share(part)] for group, part in result["groups"].items()]
    report.table(["", "questions", "score, % (95% interval)"], rows)


def _decode(report: Report, result: Json) -> None:
    report.section("The cost of a token")
    report.text(DECODE_TEXT)
    names = {"this model": "model", "attention with a cache": "attention"}
    for title, key, scale, unit in (
        ("State kept while decoding", "state_bytes", 2**20, "MiB"),
        ("Time per token", "ms_per_token", 1, "ms"),
    ):
        series = {
            label: [(row["position"], row[key] / scale) for row in result[name]]
            for label, name in names.items()
        }
        report.line_chart(title, series, x_label="position", y_label=unit, log_x=True, log_y=True)
    rows = [
        [f"{own['position']:,}", *(f"{row['state_bytes'] / 2**20:,.2f}" for row in (own, other)),
         *(f"{row['ms_per_token']:,.2f}" for row in (own, other))]
        for own, other in zip(result["model"], result["attention"])
    ]  # fmt: skip
    header = ["position", "state, MiB", "state, MiB (attention)", "ms per token", "ms per token (attention)"]
    report.table(header, rows)
    report.text(
        f"On {result['device']}, {result['threads']} threads, medians of {result['timed_steps']} steps. This "
        f"model ({result['model_parameters']:,} parameters): {result['model_method']}. Attention "
        f"({result['attention_parameters']:,} parameters, random weights): {result['attention_method']}."
    )


def _harness(report: Report, result: Json) -> None:
    report.section("lm-evaluation-harness")
    report.text(
        f"Tasks from local files, scored by harness {result['harness_version']} with our log-likelihoods."
    )
    rows = [
        [task, metric, f"{value:.4f}", result["questions"].get(task, "")]  # a group has none
        for task, metrics in sorted(result["results"].items())
        for metric, value in sorted(metrics.items())
    ]
    report.table(["task", "metric", "value", "questions"], rows)


def _sample(report: Report, result: Json) -> None:
    report.section("A sample")
    report.text("The start of a held-out document, then what the model wrote, then what really follows.")
    for key in ("prompt", "continuation", "actual"):
        report.text({"prompt": "Given:", "continuation": "Written by the model:", "actual": "Really:"}[key])
        report.preformatted(result[key])


def _seconds(report: Report, summary: Json, results: Mapping[str, Json]) -> None:
    report.section("Where the time went")
    stages = {
        key.removeprefix("seconds/"): value for key, value in summary.items() if key.startswith("seconds/")
    }
    first_loss = stages.pop("first_loss", None)
    rows = [[name, f"{value:,.1f}"] for name, value in stages.items()]
    rows += [
        [f"eval: {name}, step {record['step']:,}", f"{record['seconds']:,.1f}"]
        for name, record in sorted(results.items())
    ]
    report.table(["stage", "seconds"], rows)
    if first_loss is not None:
        report.text(f"Time to the first loss line: {first_loss:,.1f} seconds after the start.")


_SECTIONS = {
    "perplexity": _perplexity,
    "context_length": _context_length,
    **dict.fromkeys(RULER, _ruler),
    "mqar": _mqar,
    "decode": _decode,
    "harness": _harness,
    "sample": _sample,
}

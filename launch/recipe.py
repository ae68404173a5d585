"""A recipe is a whole run: the rooms' sections composed, parsed strictly, checked together, and resolved.

No room below knows the whole; what two sections must agree on is checked here, before anything starts.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from checkpoints.config import CheckpointConfig
from data_pipeline.config import DataConfig
from evals.config import EvalConfig
from launch.corpus import corpus_layer
from launch.fit import fit_mesh, fit_to_devices
from launch.layers import merge, override, read_layers
from trellis_dist.files import digest
from trellis_dist.models.config import ModelConfig
from trellis_dist.parallel.config import MeshConfig, SequenceConfig, TensorConfig
from trellis_dist.training.config import LoggingConfig, OptimizerConfig, ScheduleConfig, TrainingConfig
from trellis_dist.validation import STRICT

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")

__all__ = [
    "Recipe",
    "differences",
    "dotted_items",
    "load_recipe",
    "parse_evals",
    "parse_recipe",
    "recipe_digest",
    "resolve",
]

# The sections of data.mixture have the keys of data.source.
MIXTURE = re.compile(r"data\.mixture\.[^.]+\.")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run.

    Attributes:
        name: names the default run folder, ``runs/<name>``.
        description: one sentence for people.
        choices: dotted key -> reason, for every value that the paper does not give and that is our choice.
        model, mesh, tensor, sequence, data, optimizer, schedule, training, checkpoint, evals, logging: the
            rooms' sections.
    """

    __pydantic_config__ = STRICT

    name: str
    description: str = ""
    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    mesh: MeshConfig = field(default_factory=MeshConfig)
    tensor: TensorConfig = field(default_factory=TensorConfig)
    sequence: SequenceConfig = field(default_factory=SequenceConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evals: EvalConfig = field(default_factory=EvalConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    choices: dict[str, str] = field(default_factory=dict)

    @property
    def global_rows(self) -> int:
        """Rows of ``data.sequence_length`` tokens in one optimizer step, over the whole mesh."""
        return self.training.global_batch_tokens // self.data.sequence_length

    def tokens(self) -> int:
        """Tokens of the whole run."""
        return self.training.steps * self.training.global_batch_tokens


def load_recipe(
    reference: str,
    overrides: Sequence[str] = (),
    *,
    corpus: str | None = None,
    dataset_dir: Path | None = None,
) -> Recipe:
    """Recipe by name or path (``350m-c4``, ``my.toml``, ``350m-c4+contexts/16k``).

    Args:
        reference: name in ``launch/recipes``, path ending in .toml, or several joined by ``+``.
        overrides: ``a.b=c`` assignments, applied last.
        corpus: another text than the recipe's: a path, or a Hugging Face name with its revision.
        dataset_dir: where the token shards are, instead of ``data.directory``.

    Raises:
        ValueError: one line per problem, each with key, value and remedy.
        FileNotFoundError: no such recipe, or no such corpus.
    """
    table = read_layers(reference)
    if corpus is not None:
        for key in ("source", "mixture"):
            table.setdefault("data", {}).pop(key, None)
        merge(table, corpus_layer(corpus, recipe_name=str(table.get("name", "run"))))
    if dataset_dir is not None:
        merge(table, {"data": {"directory": str(dataset_dir)}})
    override(table, overrides)
    return parse_recipe(table, source=reference)


def parse_recipe(table: Mapping[str, Any], *, source: str) -> Recipe:
    """Validate a table (TOML, or a saved ``recipe.json``): no strings for numbers, no unknown keys."""
    recipe = _validated(Recipe, table, f"recipe {source}")
    problems = list(_contradictions(recipe))
    if problems:
        raise ValueError(_headed(f"recipe {source}", problems))
    return recipe


def _validated(kind: type[T], table: Mapping[str, Any], source: str) -> T:
    from pydantic import ValidationError

    try:
        # JSON mode is strict about types and still takes arrays for tuples and tables for dataclasses.
        return _adapter(kind).validate_json(json.dumps(table, default=str), strict=True)
    except ValidationError as error:
        lines = [_explain(problem, table) for problem in error.errors()]
        raise ValueError(_headed(source, lines)) from None


_ADAPTERS: dict[type, TypeAdapter[Any]] = {}


def _adapter(kind: type[T]) -> TypeAdapter[T]:
    """Made once: it costs more than what it is used for, and an experiment loads a hundred recipes."""
    from pydantic import TypeAdapter

    if kind not in _ADAPTERS:
        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]


@dataclass(frozen=True, kw_only=True)
class _EvalsAlone:
    evals: EvalConfig = field(default_factory=EvalConfig)


def parse_evals(table: Mapping[str, Any], *, source: str) -> EvalConfig:
    """Validate ``{"evals": {...}}`` as `parse_recipe` validates a recipe's section; raises as it does."""
    return _validated(_EvalsAlone, table, source).evals


def resolve(recipe: Recipe) -> dict[str, Any]:
    """Every key with its value, as JSON types: what is saved with the run; ``parse_recipe`` reads it."""
    resolved: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(recipe)))
    return resolved


def recipe_digest(recipe: Recipe) -> str:
    """SHA-256 of the resolved recipe."""
    return digest(resolve(recipe))


def dotted_items(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of a resolved recipe as ``("model.trellis.slots", 64)``, without ``choices`` (documentation)."""
    for key, value in table.items():
        if not prefix and key == "choices":
            continue
        if isinstance(value, Mapping):
            yield from dotted_items(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ between two resolved recipes: key -> (before, after)."""
    old, new = dict(dotted_items(before)), dict(dotted_items(after))
    return {key: (old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)}


def _headed(source: str, lines: Sequence[str]) -> str:
    return "\n".join(f"{source}: {line}" for line in lines)


def _explain(problem: Mapping[str, Any], table: Mapping[str, Any]) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    kind = problem["type"]
    if kind == "value_error":
        return str(problem["ctx"]["error"])
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{key} = {_show(_lookup(table, problem['loc']))}: unknown key; {_nearest(key)}"
    if kind in ("missing", "missing_keyword_only_argument", "missing_argument"):
        return f"{key} is missing: add it to the recipe or give --set {key}=..."
    if kind in ("dataclass_type", "dataclass_exact_type"):
        return f"{key} = {_show(problem['input'])}: this is a section; write [{key}] with its keys"
    return f"{key} = {_show(problem['input'])}: {_lower(problem['msg'])}"


def _lookup(table: Any, path: Sequence[Any]) -> Any:
    for part in path:
        table = table[part]
    return table


def _show(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]


def _nearest(key: str) -> str:
    """Closest valid key: its leaf name in another section, or the closest spelling, siblings first."""
    known = _keys_of_a_recipe()
    section, _, leaf = key.rpartition(".")
    same_leaf = [name for name in known if name.rpartition(".")[2] == leaf]
    siblings = [name for name in known if name.rpartition(".")[0] == section]
    near = same_leaf or _closest(leaf, siblings) or _closest(leaf, known)
    if near:
        return "did you mean " + " or ".join(near) + "?"
    return f"valid keys there: {', '.join(siblings)}" if siblings else "remove it"


def _closest(leaf: str, keys: Sequence[str]) -> list[str]:
    leaves = {name.rpartition(".")[2]: name for name in keys}
    return [leaves[close] for close in difflib.get_close_matches(leaf, leaves, n=1)]


@cache
def _keys_of_a_recipe() -> tuple[str, ...]:
    return tuple(_known_keys(Recipe))


def _known_keys(section: type, prefix: str = "") -> Iterator[str]:
    hints = get_type_hints(section)
    for item in dataclasses.fields(section):
        yield f"{prefix}{item.name}"
        if dataclasses.is_dataclass(hints[item.name]):
            yield from _known_keys(hints[item.name], f"{prefix}{item.name}.")


def _contradictions(recipe: Recipe) -> Iterator[str]:
    """What the sections must agree on; each line names the keys, the arithmetic and the remedy."""
    yield from _vocabulary(recipe)
    yield from _batch_and_mesh(recipe)
    yield from _schedule(recipe)
    for key in recipe.choices:
        if MIXTURE.sub("data.source.", key) not in _keys_of_a_recipe():
            yield f"choices.{json.dumps(key)}: there is no such key; {_nearest(key)}"


def _vocabulary(recipe: Recipe) -> Iterator[str]:
    pieces, rows = recipe.data.tokenizer.vocab_size, recipe.model.vocab_size
    if recipe.data.tokenizer.path is None and pieces > rows:
        yield (
            f"data.tokenizer.vocab_size = {pieces} is more than model.vocab_size = {rows}: "
            "the embedding needs a row for every piece; raise model.vocab_size"
        )


def _batch_and_mesh(recipe: Recipe) -> Iterator[str]:
    tokens, length = recipe.training.global_batch_tokens, recipe.data.sequence_length
    if tokens % length:
        lower = max(length, tokens // length * length)
        yield (
            f"training.global_batch_tokens = {tokens} is no multiple of data.sequence_length = {length}: "
            f"use {lower} or {lower + length}"
        )
        return
    one_replica = fit_to_devices(recipe, recipe.mesh.sp * recipe.mesh.tp)  # where mesh.dp is open
    try:
        fit_mesh(one_replica, world_size=one_replica.mesh.world_size() or 1)
    except ValueError as error:
        yield str(error)


def _schedule(recipe: Recipe) -> Iterator[str]:
    steps, schedule = recipe.training.steps, recipe.schedule
    if schedule.warmup_steps >= steps:
        yield (
            f"schedule.warmup_steps = {schedule.warmup_steps} leaves nothing of training.steps = {steps}: "
            f"use at most {max(0, steps - 1)}"
        )
    decay = math.ceil(schedule.decay_fraction * steps)
    if schedule.kind == "wsd" and schedule.warmup_steps + decay > steps:
        yield (
            f"schedule.warmup_steps = {schedule.warmup_steps} + decay {decay} steps "
            f"(schedule.decay_fraction = {schedule.decay_fraction}) exceed training.steps = {steps}: "
            "lower one of them"
        )

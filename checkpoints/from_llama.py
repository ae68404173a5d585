"""A Llama turned into the start of a Trellis: what both have is copied, the rest is initialised and listed.

    Llama, layer i                     Trellis, layer i
    embed_tokens, norm, lm_head        embedding_weight, norm, head_weight (untied models)
    input_layernorm                    mixer_norm
    q_proj, k_proj, v_proj, o_proj     mixer.q_weight, k_weight, v_weight, out_weight
    post_attention_layernorm, mlp      mlp_norm, mlp

Heads that share a key and a value (grouped queries) get a copy of it each. The convolution on q and k starts
as the identity, so that the projections mean what they meant; the output gate, the latent targets, step sizes
and forget gates have no counterpart and get the project's own initial draw. An attention layer of a hybrid
takes all of a Llama layer over, rotary positions included.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints.import_model import Imported, check_shape, parameter_shapes
from checkpoints.source_folder import SourceFolder, checked_section
from trellis_dist.models.config import ATTENTION_KINDS, ModelConfig
from trellis_dist.models.language_model import build_language_model

__all__ = ["convert_llama", "llama_section"]

LAYER = re.compile(r"blocks\.([0-9]+)\.(.+)")
OUTER = {
    "embedding_weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head_weight": "lm_head.weight",
}
INNER = {
    "mixer_norm.weight": "input_layernorm.weight",
    "mixer.q_weight": "self_attn.q_proj.weight",
    "mixer.k_weight": "self_attn.k_proj.weight",
    "mixer.v_weight": "self_attn.v_proj.weight",
    "mixer.out_weight": "self_attn.o_proj.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "mlp.gate_weight": "mlp.gate_proj.weight",
    "mlp.up_weight": "mlp.up_proj.weight",
    "mlp.down_weight": "mlp.down_proj.weight",
}
# What the Llama's weights fix: with other heads, say, the same numbers would mean something else.
FIXED = ("vocab_size", "num_layers", "dim", "num_heads", "mlp_hidden")
GROUPED = ("mixer.k_weight", "mixer.v_weight")
CONVOLUTIONS = ("mixer.q_conv_weight", "mixer.k_conv_weight", "mixer.v_conv_weight")


def llama_section(directory: Path) -> dict[str, Any]:
    """The model section with a Llama's sizes; what a Llama has not is left at the project's defaults.

    Raises:
        FileNotFoundError: no folder, or no config.json in it.
        ValueError: the folder holds another kind of model, or one that a Trellis cannot take over.
    """
    source = SourceFolder(directory)
    config, where = source.config, source.directory / "config.json"
    if config.get("model_type") != "llama":
        raise ValueError(
            f"{where} has model_type {config.get('model_type')!r}: only 'llama' is converted "
            "(LlamaForCausalLM)"
        )
    heads, dim = (_whole(config, key, where) for key in ("num_attention_heads", "hidden_size"))
    head_dim = config.get("head_dim")
    if head_dim is not None and head_dim != dim // heads:
        raise ValueError(
            f"{where} has head_dim {head_dim!r}: a Trellis needs hidden_size / heads = {dim // heads}"
        )
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{where} has hidden_act {config['hidden_act']!r}: the MLP of a Trellis has 'silu'")
    return {
        "vocab_size": _whole(config, "vocab_size", where),
        "num_layers": _whole(config, "num_hidden_layers", where),
        "dim": dim,
        "num_heads": heads,
        "mlp_hidden": _whole(config, "intermediate_size", where),
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "init_std": config.get("initializer_range", 0.02),
        "attention": {"rope_theta": _rope_theta(config)},
    }


def convert_llama(directory: Path, section: Mapping[str, Any], *, seed: int) -> Imported:
    """Initialise the model of `section` from the Llama in `directory`.

    Args:
        section: a model section with the Llama's sizes (`llama_section`); slots, chunks, pattern and the rest
            may be chosen.
        seed: of what the Llama has no counterpart for.

    Raises:
        FileNotFoundError, ValueError: as `llama_section`, sizes that are not the Llama's, or tensors that do
            not fit.
    """
    _check_sizes(section, directory)
    source = SourceFolder(directory)
    config = checked_section(section, source=str(directory))
    if config.num_layers > len(source.files):  # before a model of so many layers is made
        raise ValueError(f"{directory} has {len(source.files)} tensors for {config.num_layers} layers")
    groups = _groups(source)
    _check_shapes(source, config, groups)
    model = build_language_model(config, seed=seed)
    mapped: dict[str, str] = {}
    fresh: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        theirs = _counterpart(name)
        if theirs is None:
            fresh[name] = _initialise(name, parameter)
            continue
        value = source.read(theirs)
        if _inner(name) in GROUPED:
            value = _each_head(value, groups, config)
        with torch.no_grad():
            parameter.copy_(value)
        mapped[name] = theirs
    unmapped = _unmapped(source, set(mapped.values()), config)
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return Imported(config, tensors, mapped, fresh, unmapped, _notes(config, groups))


def _check_sizes(section: Mapping[str, Any], directory: Path) -> None:
    """Check that `section` has the sizes of the Llama. Raises ValueError."""
    theirs = llama_section(directory)
    for key in FIXED:
        if section.get(key) != theirs[key]:
            raise ValueError(
                f"model.{key} = {section.get(key)!r}, but the weights of {directory} are for {theirs[key]}: "
                "leave it out"
            )


def _check_shapes(source: SourceFolder, config: ModelConfig, groups: int) -> None:
    """Compare the headers with the model's shapes before memory is taken for it. Raises ValueError."""
    for name, shape in parameter_shapes(config, source=source.directory).items():
        if (theirs := _counterpart(name)) is None:
            continue
        dtype, found = source.header(theirs)
        if _inner(name) in GROUPED and found:
            found = (found[0] * groups, *found[1:])
        check_shape(name, (dtype, found), shape, source=source.directory)


def _whole(config: Mapping[str, Any], key: str, where: Path) -> int:
    value = config.get(key)
    if type(value) is not int or not 1 <= value < 1 << 31:
        raise ValueError(f"{where} has {key} = {value!r}: a whole number of 1 or more is needed")
    return value


def _rope_theta(config: Mapping[str, Any]) -> Any:
    """Where transformers 5 and older ones write it."""
    parameters = config.get("rope_parameters")
    inner = parameters.get("rope_theta") if isinstance(parameters, dict) else None
    return inner or config.get("rope_theta") or 10_000.0


def _groups(source: SourceFolder) -> int:
    """Heads of the Llama that share a key and a value."""
    where = source.directory / "config.json"
    heads = _whole(source.config, "num_attention_heads", where)
    shared = source.config.get("num_key_value_heads")
    kept = heads if shared is None else _whole(source.config, "num_key_value_heads", where)
    if heads % kept:
        raise ValueError(f"{where} has num_key_value_heads {kept}, which does not divide {heads} heads")
    return heads // kept


def _counterpart(name: str) -> str | None:
    """The Llama's name of our parameter, or None."""
    match = LAYER.fullmatch(name)
    if match is None:
        return OUTER.get(name)
    inner = INNER.get(match[2])
    return None if inner is None else f"model.layers.{match[1]}.{inner}"


def _inner(name: str) -> str:
    match = LAYER.fullmatch(name)
    return match[2] if match else name


def _each_head(value: Tensor, groups: int, config: ModelConfig) -> Tensor:
    """Rows of the shared keys or values [H / groups D, dim], repeated: [H D, dim]."""
    heads = value.view(-1, config.head_dim, value.shape[1])
    return heads.repeat_interleave(groups, dim=0).flatten(0, 1)


def _initialise(name: str, parameter: torch.nn.Parameter) -> str:
    """Leave the project's own draw, or better it; says which."""
    if _inner(name) not in CONVOLUTIONS:
        return "the project's initial draw"
    with torch.no_grad():
        parameter.zero_()
        parameter[:, -1] = 1.0
    return "identity: the current token's tap is 1"


def _unmapped(source: SourceFolder, used: set[str], config: ModelConfig) -> dict[str, str]:
    """Tensors and settings that nothing was made of, and why."""
    found = {}
    for name in sorted(set(source.files) - used):
        tied = name == OUTER["head_weight"] and config.tie_embeddings
        found[name] = "the embedding takes its place (tied)" if tied else "a Trellis has no such parameter"
    attention = not set(config.pattern).isdisjoint(ATTENTION_KINDS)
    if not set(config.pattern) <= set(ATTENTION_KINDS):
        found["rotary positions"] = "a recurrent layer has none: its state knows the order of tokens"
    scaling = source.config.get("rope_scaling") or source.config.get("rope_parameters")
    kind = (
        scaling.get("rope_type", scaling.get("type", "default")) if isinstance(scaling, dict) else "default"
    )
    if attention and kind != "default":
        found["rope_scaling"] = f"attention layers have plain rotary positions, not {kind!r}"
    return found


def _notes(config: ModelConfig, groups: int) -> tuple[str, ...]:
    notes = []
    if groups > 1:
        notes.append(
            f"keys and values of {groups} heads each were shared (grouped queries): repeated per head"
        )
    for kind in dict.fromkeys(config.pattern):
        if kind not in ATTENTION_KINDS:
            name = "Trellis" if kind == "trellis" else kind
            notes.append(f"a {name} layer is no attention: expect a high loss until it is trained on")
        elif kind == "sliding_window":
            notes.append(f"a sliding_window layer sees {config.attention.sliding_window} tokens only")
    return tuple(notes)

"""A Llama's weights arrive where they belong, and what has no counterpart is listed on both sides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from checkpoints.from_llama import convert_llama, llama_section
from trellis_dist.models.language_model import LanguageModel, build_language_model

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "initializer_range": 0.3,
}


def llama(folder: Path, **options: Any) -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**{**SIZES, **options})).eval()
        for parameter in model.parameters():  # norms and biases too: none is at its start
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    return model


def converted(folder: Path, **section: Any) -> tuple[LanguageModel, Any]:
    imported = convert_llama(folder, {**llama_section(folder), **section}, seed=4)
    model = build_language_model(imported.config, seed=0)
    model.load_state_dict(dict(imported.tensors))
    return model, imported


@pytest.mark.parametrize("shared", [1, 2, 4])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("theta", [10_000.0, 500.0])
def test_with_attention_layers_it_is_the_llama(tmp_path: Path, shared: int, tied: bool, theta: float) -> None:
    options = {"num_key_value_heads": shared, "tie_word_embeddings": tied}
    theirs = llama(tmp_path, **options, rope_parameters={"rope_theta": theta, "rope_type": "default"})
    ours, imported = converted(tmp_path, pattern=["attention"])
    x = torch.randint(40, (2, 13), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours(x), theirs(x).logits, atol=1e-5, rtol=1e-5)
    assert (imported.fresh, imported.unmapped) == ({}, {})


def test_trellis_layers_take_over_what_both_have(tmp_path: Path) -> None:
    theirs = llama(tmp_path).state_dict()
    ours, imported = converted(tmp_path, trellis={"slots": 6, "chunk_size": 4})
    own = build_language_model(imported.config, seed=4).state_dict()
    named = ours.state_dict()
    assert {*imported.mapped} | {*imported.fresh} == {*named}
    assert {*imported.mapped.values()} == {*theirs}, "every tensor of the Llama is used"
    for name, source in imported.mapped.items():
        expected = theirs[source]
        if name.endswith((".k_weight", ".v_weight")):
            expected = expected.view(2, 1, 4, 16).expand(2, 2, 4, 16).reshape(16, 16)
        assert torch.equal(named[name], expected), name
    for name in imported.fresh:
        if "conv" in name:
            assert torch.equal(named[name], torch.tensor([0.0, 0.0, 0.0, 1.0]).expand(16, 4)), name
        else:
            assert torch.equal(named[name], own[name]), name
    inner = {name.removeprefix("blocks.0.mixer.") for name in imported.fresh if "blocks.0" in name}
    assert {"alpha_weight", "output_gate_weight", "step_weight", "decay_weight", "q_conv_weight"} < inner
    assert {*imported.unmapped} == {"rotary positions"}
    assert any("grouped queries" in note for note in imported.notes)


def test_a_baseline_takes_over_queries_keys_values_behind_taps_that_change_nothing(
    tmp_path: Path,
) -> None:
    llama(tmp_path)
    ours, imported = converted(tmp_path, pattern=["gated_deltanet", "sliding_window"])
    named = ours.state_dict()
    inner = {name.removeprefix("blocks.0.mixer.") for name in imported.mapped if "blocks.0.mixer." in name}
    assert inner == {"q_weight", "k_weight", "v_weight", "out_weight"}
    for part in "qkv":
        taps = named[f"blocks.0.mixer.{part}_conv_weight"]
        assert torch.equal(taps, torch.tensor([0.0, 0.0, 0.0, 1.0]).expand(16, 4)), part
    assert not [name for name in imported.fresh if name.startswith("blocks.1.")]
    assert "a recurrent layer has none" in imported.unmapped["rotary positions"]
    assert [note for note in imported.notes if "gated_deltanet layer is no attention" in note]
    assert [note for note in imported.notes if "sliding_window layer sees 256 tokens only" in note]


def test_what_nothing_is_made_of_is_listed(tmp_path: Path) -> None:
    llama(tmp_path, attention_bias=True, tie_word_embeddings=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    _, imported = converted(tmp_path)
    left = {*imported.unmapped}
    assert {f"model.layers.{i}.self_attn.{p}_proj.bias" for i in (0, 1) for p in "qkvo"} < left
    assert "tied" in imported.unmapped["lm_head.weight"]
    assert "rotary positions" in left
    assert left | {*imported.mapped.values()} == {*tensors, "rotary positions"}


def test_the_seed_draws_only_what_is_fresh(tmp_path: Path) -> None:
    llama(tmp_path)
    section = llama_section(tmp_path)
    one, two = (convert_llama(tmp_path, section, seed=seed) for seed in (1, 2))
    for name in one.mapped:
        assert torch.equal(one.tensors[name], two.tensors[name])
    assert any(not torch.equal(one.tensors[name], two.tensors[name]) for name in one.fresh)


def _edit(folder: Path, change: dict[str, Any]) -> None:
    table = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(table | change))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gpt2"}, "only 'llama' is converted"),
        ({"hidden_size": "16"}, "hidden_size = '16'"),
        ({"num_hidden_layers": 10**8}, "for 100000000 layers"),
        ({"num_key_value_heads": 3}, "does not divide 4 heads"),
        ({"num_key_value_heads": 1}, "do not belong together"),
        ({"head_dim": 8}, "hidden_size / heads = 4"),
        ({"hidden_act": "gelu"}, "'silu'"),
        ({"vocab_size": 41}, "do not belong together"),
        ({"rms_norm_eps": "tiny"}, "model.norm_eps = 'tiny'"),
        ({"num_hidden_layers": 3}, "has no tensor"),
    ],
    ids=str,
)
def test_what_cannot_be_converted_is_one_line(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    llama(tmp_path)
    _edit(tmp_path, change)
    with pytest.raises(ValueError) as caught:
        converted(tmp_path)
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_name_that_would_draw_on_the_terminal_is_refused_in_one_line(tmp_path: Path) -> None:
    llama(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "a\n\x1b[2J": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: tensor name 'a\\n\\x1b\[2J'") as caught:
        converted(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_heads", 8),
        ("num_heads", 2),
        ("dim", 32),
        ("num_layers", 1),
        ("mlp_hidden", 32),
        ("vocab_size", 8),
    ],
)
def test_the_sizes_are_the_llamas(tmp_path: Path, key: str, value: int) -> None:
    """Other heads fit the same shapes: the projections would be cut where the Llama's heads are not."""
    llama(tmp_path)
    with pytest.raises(ValueError, match=rf"model\.{key} = {value}, but the weights of .* leave it out"):
        converted(tmp_path, **{key: value})
    converted(tmp_path, **{key: llama_section(tmp_path)[key]})


@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": 2**31 - 1},
        {"hidden_size": 2**20, "head_dim": 2**18, "intermediate_size": 2**20},
        {"hidden_size": 2**30, "head_dim": 2**28, "intermediate_size": 2**31 - 1},
        {"vocab_size": 17, "num_key_value_heads": 1},
    ],
    ids=str,
)
def test_no_model_is_made_of_sizes_that_the_headers_do_not_have(
    tmp_path: Path, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(*arguments: Any, **options: Any) -> None:
        raise AssertionError("memory was taken before the shapes were compared")

    llama(tmp_path)
    _edit(tmp_path, change)
    monkeypatch.setattr("checkpoints.from_llama.build_language_model", made)
    monkeypatch.setattr("checkpoints.source_folder.SourceFolder.read", made)
    with pytest.raises(ValueError) as caught:
        converted(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_stretched_positions_of_attention_layers_are_listed(tmp_path: Path) -> None:
    llama(tmp_path)
    _edit(tmp_path, {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}})
    _, imported = converted(tmp_path, pattern=["attention"])
    assert "linear" in imported.unmapped["rope_scaling"]

"""Every model of the package behaves as a transformers model: logits, gradients, `generate`, saving."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.models.test_decode import MODELS
from trellis_dist.models.baseline_config import BASELINES, MINI_BATCH_KINDS
from trellis_dist.models.config import ATTENTION_KINDS, AttentionConfig, ModelConfig
from trellis_dist.models.huggingface.config import TrellisLMConfig
from trellis_dist.models.huggingface.folder import PREFIX
from trellis_dist.models.huggingface.modeling import TrellisForCausalLM
from trellis_dist.models.language_model import LanguageModel

CLOSE: dict[str, Any] = {"atol": 1e-10, "rtol": 1e-10}


def section_of(config: ModelConfig) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(config)))


def wrapped(model: LanguageModel) -> TrellisForCausalLM:
    config = TrellisLMConfig(model_section=section_of(model.config), bos_token_id=1, pad_token_id=0)
    outer = TrellisForCausalLM(config).to(next(model.parameters()).dtype).eval()
    outer.model.load_state_dict(model.state_dict())
    return outer


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def pair(request, tiny) -> tuple[LanguageModel, TrellisForCausalLM]:
    options = dict(request.param)
    if "attention_window" in options:
        options["attention"] = AttentionConfig(window=options.pop("attention_window"))
    model = tiny(**options, tie_embeddings="window" in request.node.name)
    return model, wrapped(model)


@pytest.fixture
def outer(tiny) -> TrellisForCausalLM:
    return wrapped(tiny())


def continued(outer: TrellisForCausalLM, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"max_new_tokens": 9, "do_sample": False, **options}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return outer.generate(ids, attention_mask=mask, **options)


def test_logits_are_the_models_with_and_without_a_cache(pair, tokens) -> None:
    model, outer = pair
    x = tokens(2, 11)
    expected = model(x)
    assert torch.equal(outer(x).logits, expected)
    first = outer(x[:, :6], use_cache=True)
    cache = first.past_key_values
    assert first.logits.requires_grad is False
    parts = [first.logits]
    for column in (6, 7):
        parts.append(outer(x[:, column : column + 1], past_key_values=cache).logits)
    parts.append(outer(x[:, 8:], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, **CLOSE)
    assert cache.get_seq_length() == 11
    last = outer(x, use_cache=True, logits_to_keep=1).logits
    torch.testing.assert_close(last, expected[:, -1:], **CLOSE)
    torch.testing.assert_close(outer(x, logits_to_keep=3).logits, expected[:, -3:], **CLOSE)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 7}], ids=str)
def test_generate_with_states_writes_what_reading_everything_again_writes(pair, tokens, options) -> None:
    _, outer = pair
    x = tokens(2, 5)
    with_states = continued(outer, x, **options)
    assert with_states.shape == (2, 14)
    assert torch.equal(with_states, continued(outer, x, use_cache=False, **options))


def test_a_state_of_trellis_layers_does_not_grow_and_one_of_attention_does(tiny, tokens) -> None:
    sizes = {}
    for kind in ("trellis", "attention"):
        outer = wrapped(tiny(pattern=(kind,)))
        sizes[kind] = [
            continued(
                outer, tokens(2, 5), max_new_tokens=new, return_dict_in_generate=True
            ).past_key_values.bytes()
            for new in (2, 80)
        ]
    assert sizes["trellis"][0] == sizes["trellis"][1] > 0
    assert sizes["attention"][0] < sizes["attention"][1]


def padded(rows: list[Tensor], *, left: bool = True) -> tuple[Tensor, Tensor]:
    length = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), length, dtype=torch.int64)
    for number, row in enumerate(rows):
        where = slice(length - len(row), length) if left else slice(0, len(row))
        ids[number, where], mask[number, where] = row, 1
    return ids, mask


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=str)
def test_prompts_padded_on_the_left_continue_as_each_does_alone(outer, tokens, options) -> None:
    rows = [tokens(length, seed=length) for length in (3, 8, 5)]
    together = continued(outer, *padded(rows), **options)
    for number, row in enumerate(rows):
        assert torch.equal(together[number, 8:], continued(outer, row[None], **options)[0, len(row) :])


def test_logits_of_a_padded_batch_are_those_of_each_row_alone(pair, tokens) -> None:
    model, outer = pair
    rows = [tokens(length, seed=length) for length in (3, 8, 5)]
    for left in (True, False):
        ids, mask = padded(rows, left=left)
        logits = outer(ids, attention_mask=mask).logits
        for number, row in enumerate(rows):
            kept = logits[number][mask[number].bool()]
            torch.testing.assert_close(kept, model(row[None])[0], **CLOSE)


def test_a_ragged_batch_goes_on_by_several_tokens(outer, tokens) -> None:
    rows, more = [tokens(3, seed=1), tokens(6, seed=2)], tokens(2, 5, seed=3)
    ids, mask = padded(rows)
    cache = outer(ids, attention_mask=mask, use_cache=True).past_key_values
    logits = outer(more, past_key_values=cache).logits
    for number, row in enumerate(rows):
        alone = outer.model(torch.cat([row, more[number]])[None])[0, len(row) :]
        torch.testing.assert_close(logits[number], alone, **CLOSE)


def test_a_given_cache_continues_a_conversation(outer, tokens) -> None:
    first, more = tokens(1, 5), tokens(1, 4, seed=1)
    out = continued(outer, first, return_dict_in_generate=True)
    prompt = torch.cat([out.sequences, more], dim=1)
    again = continued(outer, prompt, past_key_values=out.past_key_values)
    assert torch.equal(again, continued(outer, prompt))


def test_the_loss_and_its_gradients_are_the_models(pair, tokens) -> None:
    model, outer = pair
    x = tokens(2, 9)
    labels = x.clone()
    labels[0, 3] = -100
    loss = outer(x, labels=labels).loss
    loss.backward()
    shifted = torch.cat([labels[:, 1:], torch.full((2, 1), -100)], dim=1)
    expected = model.loss_sum(x, shifted) / int((shifted != -100).sum())
    expected.backward()
    # transformers computes its loss in fp32
    torch.testing.assert_close(loss.double(), expected, atol=1e-6, rtol=1e-6)
    for ours, theirs in zip(model.parameters(), outer.parameters(), strict=True):
        torch.testing.assert_close(theirs.grad, ours.grad, atol=1e-6, rtol=1e-5)


REFUSED = {
    "a hole": (lambda o, x: o(x, attention_mask=torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]])), "with a hole"),
    "an empty row": (lambda o, x: o(x, attention_mask=torch.zeros_like(x)), "without tokens"),
    "a mask of another length": (lambda o, x: o(x, attention_mask=torch.ones(2, 3)), r"give \[2, 4\]"),
    "padding after a prompt": (
        lambda o, x: o(x, attention_mask=torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]), use_cache=True),
        "pad prompts on the left",
    ),
    "a short mask with a cache": (
        lambda o, x: o(
            x, attention_mask=torch.ones(2, 4), past_key_values=o(x, use_cache=True).past_key_values
        ),
        r"give \[2, 8\]",
    ),
    "embeddings": (lambda o, x: o(x, inputs_embeds=torch.zeros(2, 4, 16)), "inputs_embeds"),
    "hidden states": (lambda o, x: o(x, output_hidden_states=True), "output_hidden_states"),
    "labels with a cache": (lambda o, x: o(x, labels=x, use_cache=True), "use_cache=False"),
    "going back": (lambda o, x: continued(o, x[:1], prompt_lookup_num_tokens=2), "stateful"),
    "other vocabulary": (lambda o, x: o.resize_token_embeddings(64), "cannot be resized"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_do_is_refused(outer, tokens, case: str) -> None:
    call, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        call(outer, tokens(2, 4))


def test_embedding_modules_are_refused_with_what_there_is_instead(outer) -> None:
    """As NotImplementedError, which transformers takes for a model that has none."""
    for call, name in (
        (outer.get_input_embeddings, "embedding_weight"),
        (outer.get_output_embeddings, "output_weight"),
    ):
        with pytest.raises(NotImplementedError, match=f"read model.model.{name}") as caught:
            call()
        assert len(str(caught.value).splitlines()) == 1
        assert getattr(outer.model, name).shape == (outer.config.vocab_size, outer.config.hidden_size)


@pytest.mark.parametrize("kind", [*ATTENTION_KINDS, *MINI_BATCH_KINDS])
def test_rows_of_different_lengths_need_layers_that_can_stand_apart(tiny, tokens, kind: str) -> None:
    """Keys of one position, gradients of one mini-batch: rows of a batch share them."""
    hybrid = wrapped(tiny(pattern=("trellis", kind)))
    with pytest.raises(ValueError, match=f"{kind} layers keep rows of one length only"):
        continued(hybrid, *padded([tokens(3), tokens(4)]))


@pytest.mark.parametrize("kind", sorted(set(BASELINES) - set(MINI_BATCH_KINDS)))
def test_baselines_continue_padded_prompts_as_alone_and_their_states_do_not_grow(tiny, tokens, kind) -> None:
    outer, rows = wrapped(tiny(pattern=("trellis", kind))), [tokens(n, seed=n) for n in (3, 8, 5)]
    for options in ({}, {"num_beams": 3}):
        together = continued(outer, *padded(rows), **options)
        for number, row in enumerate(rows):
            alone = continued(outer, row[None], **options)[0, len(row) :]
            assert torch.equal(together[number, 8:], alone)
    answer = {"return_dict_in_generate": True}
    sizes = [continued(outer, tokens(2, 5), max_new_tokens=n, **answer) for n in (2, 40)]
    assert len({size.past_key_values.bytes() for size in sizes}) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dim": "wide"}, "model_section.dim"),
        ({"dim": 15}, "no multiple"),
        ({"slotz": 1}, "slotz"),
    ],
)
def test_a_wrong_section_is_named(config, change: dict[str, Any], words: str) -> None:
    section = section_of(config()) | change
    with pytest.raises(ValueError, match=words):
        TrellisForCausalLM(TrellisLMConfig(model_section=section))
    with pytest.raises(ValueError, match="no model_section"):
        TrellisForCausalLM(TrellisLMConfig())


def test_the_configuration_answers_what_libraries_ask(config) -> None:
    asked = TrellisLMConfig(model_section=section_of(config()))
    assert (asked.vocab_size, asked.hidden_size, asked.num_hidden_layers, asked.num_attention_heads) == (
        31,
        16,
        2,
        2,
    )


def test_saved_and_opened_again_it_is_the_same_model(pair, tokens, tmp_path: Path) -> None:
    _, outer = pair
    outer.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert type(again) is TrellisForCausalLM
    for name, tensor in outer.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    x = tokens(1, 6)
    torch.testing.assert_close(again(x).logits, outer(x).logits, **CLOSE)  # memory is aligned otherwise
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_a_folder_that_lacks_a_tensor_is_refused(outer, tmp_path: Path) -> None:
    outer.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[f"{PREFIX}blocks.1.mixer.alpha_weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="no weights for alpha_weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_new_model_has_the_projects_initial_weights(tiny, config) -> None:
    new = TrellisForCausalLM(TrellisLMConfig(model_section=section_of(config())))
    expected = tiny(seed=0, dtype=torch.float32).state_dict()
    for name, tensor in new.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name

"""Models of transformers through the scorer equal their own full forward pass and their own `generate`."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    FalconH1Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    RecurrentGemmaConfig,
)

from checkpoints.hf_export import export_for_transformers
from data_pipeline.tokenizer import Tokenizer
from evals.peer_codec import PeerCodec
from evals.peer_model import PeerModel
from evals.peers import load_peer
from evals.ruler.question import Question
from evals.runs import load_run
from evals.sampling import Sampling
from evals.scorer import Scorer
from evals.states import select_rows
from evals.tasks.ruler import score_questions
from evals.writing import TextStream
from tests.evals.fakes import RecurrentModel

END = "<|end|>"
BYTES = pre_tokenizers.ByteLevel.alphabet()
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 257}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
GROUPS = {"num_heads": 4, "head_dim": 16, "n_groups": 1}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, **HEADS),
    "gpt2": GPT2Config(vocab_size=257, n_embd=32, n_layer=2, n_head=4, n_positions=160),
    "neox": GPTNeoXConfig(**SMALL, num_attention_heads=4, intermediate_size=48),
    "mistral, sliding window": MistralConfig(**SMALL, **HEADS, sliding_window=8),
    "mamba": MambaConfig(**SMALL, state_size=8),
    "mamba2": Mamba2Config(**SMALL, **GROUPS, state_size=8, chunk_size=8),
    "attention and mamba2 in one layer": FalconH1Config(
        **SMALL, **HEADS, head_dim=8, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8,
        mamba_chunk_size=8,
    ),
    "state in the module": RecurrentGemmaConfig(
        **SMALL | {"num_hidden_layers": 3}, **HEADS, lru_width=32, attention_window_size=8
    ),
}  # fmt: skip
# Where a model computes in fp32 whatever its weights are.
TOLERANCE = {"gpt2": 1e-9, "neox": 1e-6}
TRUST = {"mamba": "steps", "state in the module": "nothing"}
TEXTS = ["The grass is green and", "", "A longer context, read once: " * 3, "The gras", "x" * 60]
CHOICES = [" blue", " the sky is wide and", "x", "", "\N{SNOWMAN}"]
REQUESTS = [(text, choice) for text in TEXTS for choice in CHOICES]


def raw_tokenizer() -> RawTokenizer:
    """One token per UTF-8 byte, and an end token."""
    vocabulary = {char: place for place, char in enumerate(sorted(BYTES))} | {END: 256}
    tokenizer = RawTokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def fast_tokenizer(raw: RawTokenizer | None = None) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=raw or raw_tokenizer(), eos_token=END)


def tiny(config, dtype=torch.float64) -> nn.Module:
    torch.manual_seed(0)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = 256
    model = AutoModelForCausalLM.from_config(config).eval().to(dtype)
    for parameter in model.parameters():  # random weights of transformers hardly look at the context
        parameter.data *= 4
    return model


@pytest.fixture(scope="module")
def codec():
    return PeerCodec(fast_tokenizer())


@pytest.fixture(scope="module", params=CONFIGS)
def peer(request):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return request.param, PeerModel(tiny(CONFIGS[request.param]))


def full_scores(model, scorer, requests):
    """From one plain forward pass for each request."""
    scores = []
    for context, choice in requests:
        before, after = scorer.encode_pair(context, choice)
        with torch.no_grad():
            logits = model(torch.tensor([before + after]), use_cache=False).logits[0].double()
        rows = logits[len(before) - 1 : len(before) + len(after) - 1].log_softmax(-1)
        scores.append(float(rows.gather(-1, torch.tensor(after, dtype=torch.long)[:, None]).sum()))
    return scores


def _greedy_by_reading_again(model, ids, count):
    start = ids.shape[1]
    for _ in range(count):
        with torch.no_grad():
            token = model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, token], 1)
        if int(token) == 256:
            break
    return ids[0, start:].tolist()


@pytest.mark.parametrize("prefill_chunk", [None, 7])
def test_choices_from_one_state_equal_a_plain_forward_pass(peer, codec, prefill_chunk):
    name, model = peer
    scorer = Scorer(model, codec, prefill_chunk=prefill_chunk, max_rows=5)
    scores = scorer.log_likelihoods(REQUESTS)
    expected = full_scores(model.inner, scorer, REQUESTS)
    tolerance = TOLERANCE.get(name, 1e-5) * max(map(abs, expected))
    assert [score.log_prob for score in scores] == pytest.approx(expected, abs=tolerance)
    assert len({round(value, 3) for value in expected}) > 15  # nothing is equal by being trivial


def test_greedy_text_is_that_of_generate(peer, codec):
    _, model = peer
    prompts = [[codec.bos_id, *codec.encode(text)] for text in TEXTS]
    found = Scorer(model, codec).each(
        prompts, lambda prefix: Scorer(model, codec).write_from(prefix, Sampling(max_tokens=9))
    )
    for prompt, written in zip(prompts, found):
        ids = torch.tensor([prompt])
        if model.trust == "nothing":  # `generate` of that model does not agree with its forward pass
            expected = _greedy_by_reading_again(model.inner, ids, 9)
        else:
            expected = model.inner.generate(ids, max_new_tokens=9, do_sample=False)[0, len(prompt) :].tolist()
        ended = written.finish == "eos"
        assert [*written.tokens, *([256] if ended else [])] == expected


def test_what_the_cache_of_a_model_continues_is_found_out(peer):
    name, model = peer
    assert model.trust == TRUST.get(name, "pieces")
    assert model.prefill_chunk == (512 if model.trust == "pieces" else 2048)


def test_a_state_is_not_changed_by_continuing_it_and_its_rows_can_be_chosen(peer):
    _, model = peer
    tokens = torch.randint(250, (2, 20), generator=torch.Generator().manual_seed(1))
    whole, _ = model.prefill(tokens, model.init_state(2))
    _, state = model.prefill(tokens[:, :9], model.init_state(2))
    copies = 0
    for rows in ([0, 1], [1, 1, 0], [0, 1], [1]):
        chosen = select_rows(state, rows)
        for start, stop in ((9, 10), (10, 14), (14, 15)):
            logits, chosen = model.prefill(tokens[rows, start:stop], chosen)
            assert torch.allclose(logits, whole[rows, start:stop], rtol=1e-4, atol=1e-4)
            copies += 1
    assert copies == 12
    assert state.length == 9
    assert model.trust == "nothing" or state.bytes() > 0


def test_a_text_beyond_the_table_of_positions_is_refused(codec):
    model = PeerModel(tiny(CONFIGS["gpt2"]), name="NAME", trust="pieces")
    with pytest.raises(ValueError, match="NAME has 160 positions and cannot read 161 tokens"):
        Scorer(model, codec).rolling(["x" * 161])


# --- tokenizers


def test_a_continuation_is_decoded_and_encoded_as_one():
    raw = RawTokenizer(models.BPE({"\u2581": 0, "a": 1, "b": 2, "\u2581a": 3, "<s>": 4}, [("\u2581", "a")]))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    codec = PeerCodec(PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>"))
    assert (codec.bos_id, codec.eos_id, codec.end_ids) == (4, 4, frozenset([4]))
    assert codec.encode("ab") == codec.encode(" ab") == [3, 2]  # the space is the tokenizer's own
    assert codec.decode([3, 2]) == " ab"
    assert codec.decode([2, 4, 3]) == "b a"
    assert codec.encode_pair("b", " a") == ([0, 2], [3])
    assert codec.encode_pair("b", "a") == ([0, 2], [1])  # not the space before a text


def spaced_tokenizer():
    """As Llama's: a space before every text, none at the start of what is decoded."""
    pieces = ["<s>", "\u2581", *"theskyisbu", "\u2581the", "\u2581sky"]
    merges = [
        ("\u2581", "t"),
        ("\u2581t", "h"),
        ("\u2581th", "e"),
        ("\u2581", "s"),
        ("\u2581s", "k"),
        ("\u2581sk", "y"),
    ]
    pieces += [left + right for left, right in merges]
    raw = RawTokenizer(
        models.BPE({piece: place for place, piece in enumerate(dict.fromkeys(pieces))}, merges)
    )
    raw.add_special_tokens(["<s>"])
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(raw.to_str().encode())


def test_a_tokenizer_json_of_ours_that_puts_a_space_before_a_text(run_dir, monkeypatch):
    tokenizer = spaced_tokenizer()
    monkeypatch.setattr("evals.runs.Tokenizer.load", lambda path: tokenizer)
    codec = load_run(run_dir, device="cpu").tokenizer
    assert (codec.bos_id, codec.eos_id, codec.vocab_size) == (0, 0, tokenizer.vocab_size)
    whole = tokenizer.encode("the sky is the sky")
    before, after = Scorer(RecurrentModel(tokenizer.vocab_size), codec).encode_pair("the sky is", " the sky")
    assert before[1:] + after == whole  # no space of its own
    stream = TextStream(codec)
    assert "".join(map(stream.add, after)) == " the sky"
    questions = [Question(prompt="the sky is", ids=before, answers=("sky",), reply="", distractors=("the",))]
    asked = []
    scorer = Scorer(RecurrentModel(tokenizer.vocab_size), codec)
    score = scorer.score_from
    monkeypatch.setattr(scorer, "score_from", lambda prefix, rows: asked.append(rows) or score(prefix, rows))
    score_questions(scorer, questions, answer_tokens=1)
    assert sorted(asked[0][0]) == sorted([tokenizer.encode("sky"), tokenizer.encode("the")])


def test_a_lossless_tokenizer_of_ours_stays_as_it_is(run_dir):
    assert type(load_run(run_dir, device="cpu").tokenizer) is Tokenizer


def test_a_tokenizer_without_bos_starts_with_eos(codec):
    assert codec.bos_id == codec.eos_id == 256
    assert codec.encode(f"a{END}")[:1] == codec.encode("a")
    assert codec.decode(codec.encode("\N{SNOWMAN} a")) == "\N{SNOWMAN} a"
    assert codec.decode([256]) == ""
    two_ends = PeerCodec(fast_tokenizer(), end_ids=[7])
    assert two_ends.end_ids == {7, 256}
    with pytest.raises(ValueError, match="NAME has neither a BOS nor an EOS token"):
        PeerCodec(PreTrainedTokenizerFast(tokenizer_object=raw_tokenizer()), name="NAME")


# --- folders


def save_peer(folder, name="llama", dtype=torch.float32):
    model = tiny(CONFIGS[name], dtype)
    model.save_pretrained(folder)
    fast_tokenizer().save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("peers") / "tiny-llama"
    save_peer(path)
    return path


def test_a_folder_is_scored_as_its_model(folder):
    subject = load_peer(folder, device="cpu")
    assert subject.name == "tiny-llama"
    scorer = Scorer(subject.model, subject.tokenizer)
    scores = scorer.log_likelihoods(REQUESTS)
    expected = full_scores(tiny(CONFIGS["llama"], torch.float32), scorer, REQUESTS)
    assert [score.log_prob for score in scores] == pytest.approx(expected, abs=1e-3)


def test_the_digest_is_of_weights_and_dtype_and_the_tokenizers_its_own(folder, tmp_path):
    first = load_peer(folder, device="cpu")
    same = load_peer(folder, device="cpu")
    assert (same.digest, same.tokenizer_digest) == (first.digest, first.tokenizer_digest)
    half = load_peer(folder, device="cpu", dtype="bfloat16")
    assert half.digest != first.digest
    assert next(half.model.parameters()).dtype == torch.bfloat16
    other = shutil.copytree(folder, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["added_tokens"][0]["lstrip"] = True
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    changed = load_peer(other, device="cpu")
    assert changed.digest == first.digest
    assert changed.tokenizer_digest != first.tokenizer_digest
    for name in ("a.tiktoken", "tekken.json", "a.bpe.model"):
        before = load_peer(other, device="cpu")
        (other / name).write_text("{}")
        found = load_peer(other, device="cpu")
        assert found.digest == first.digest
        assert found.tokenizer_digest != before.tokenizer_digest, name
    settings = json.loads((other / "generation_config.json").read_text())
    (other / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": 7}))
    assert load_peer(other, device="cpu").digest != first.digest


def test_code_that_only_the_tokenizer_names_is_part_of_the_digest(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    digests = set()
    for code in ("x = 1\n", "x = 2\n"):
        (other / "own_tokenizer.py").write_text(code)
        digests.add(load_peer(other, device="cpu", trust_remote_code=True).digest)
    assert len(digests) == 1  # nothing names it
    config = json.loads((other / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own_tokenizer.x"}
    (other / "tokenizer_config.json").write_text(json.dumps(config))
    for code in ("x = 1\n", "x = 2\n"):
        (other / "own_tokenizer.py").write_text(code)
        digests.add(load_peer(other, device="cpu", trust_remote_code=True).digest)
    assert len(digests) == 3


def _no_folder(path):
    shutil.rmtree(path)


def _pickled(path):
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def _no_weights(path):
    (path / "model.safetensors").unlink()


def _own_code(path):
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    (path / "config.json").write_text(json.dumps(config))
    (path / "mine.py").write_text(f"open({str(path / 'ran')!r}, 'w')")


def _another_depth(path):
    config = json.loads((path / "config.json").read_text())
    config["num_hidden_layers"] = 3
    (path / "config.json").write_text(json.dumps(config))


def _unknown(path):
    (path / "config.json").write_text('{"model_type": "nonsense"}')


@pytest.mark.parametrize(
    "damage, words",
    [
        (_no_folder, "is no model folder: it has no config.json"),
        (_pickled, r"holds pickled weights \(pytorch_model.bin\), which run code"),
        (_no_weights, "has no weights"),
        (_own_code, r"its model is code in the folder .* give --trust-remote-code to run it"),
        (_another_depth, r"missing weights \(model.layers.2"),
        (_unknown, "is no causal language model of transformers: .*nonsense"),
    ],
)
def test_what_cannot_or_must_not_be_opened_is_one_line(folder, tmp_path, damage, words):
    path = shutil.copytree(folder, tmp_path / "model")
    damage(path)
    with pytest.raises(ValueError, match=words) as refused:
        load_peer(path, device="cpu")
    assert len(str(refused.value).splitlines()) == 1
    assert not (path / "ran").exists()


def test_our_own_export_is_scored_through_transformers_as_natively(run_dir, tmp_path):
    run = load_run(run_dir, device="cpu")
    tokenizer = Tokenizer.load(run.dataset_dir / "tokenizer.model")
    export_for_transformers(
        run.checkpoint,
        tmp_path / "out",
        tokenizer=run.dataset_dir / "tokenizer.model",
        model_config=run.recipe["model"],
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
    )
    subject = load_peer(tmp_path / "out", device="cpu", dtype="float64")
    assert subject.model.trust == "pieces"
    through = Scorer(subject.model, subject.tokenizer)
    assert through._bytes_of_a_row[1] == 0.0  # the state does not grow
    natively = Scorer(run.model.double(), run.tokenizer)
    ours, theirs = natively.log_likelihoods(REQUESTS), through.log_likelihoods(REQUESTS)
    assert [s.log_prob for s in theirs] == pytest.approx([s.log_prob for s in ours], abs=1e-9)
    sampling = Sampling(max_tokens=12, temperature=1.0, seed=3)
    prompts = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in TEXTS]
    assert through.generate(prompts, sampling) == natively.generate(prompts, sampling)

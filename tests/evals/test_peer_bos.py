"""What starts a context of a peer: the log-likelihoods are those of lm-evaluation-harness's own backend."""

from __future__ import annotations

import pytest
import torch
from tokenizers import processors

from evals.config import EvalConfig
from evals.peer_codec import PeerCodec
from evals.peer_model import PeerModel
from evals.peers import load_peer
from evals.sampling import Sampling
from evals.scorer import Scorer
from evals.states import context_ids
from evals.subject import Subject
from evals.tasks.registry import get_task
from tests.evals.test_peers import CONFIGS, END, fast_tokenizer, raw_tokenizer, save_peer, tiny

PAIRS = [("The grass is", " green"), ("a", "b"), ("", "no context"), ("two words ", " and spaces")]
WRITTEN = [(END + context, choice) for context, choice in PAIRS if context]


def tokenizer_that(adds: str):
    """One token per byte; what it puts before a text by itself."""
    raw = raw_tokenizer()
    if adds:
        raw.post_processor = processors.TemplateProcessing(single=f"{adds} $A", special_tokens=[(END, 256)])
    return fast_tokenizer(raw)


@pytest.fixture(scope="module")
def model():
    return PeerModel(tiny(CONFIGS["llama"]), trust="pieces")


@pytest.fixture(scope="module")
def backend(model):
    """Log-likelihoods of the harness's backend, with its settings as they are unless told."""
    import accelerate  # noqa: F401  the backend's own import
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    def scores(tokenizer, pairs):
        harness = HFLM(pretrained=model.inner, tokenizer=tokenizer, batch_size=2, max_length=64)
        requests = [
            Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=i)
            for i, pair in enumerate(pairs)
        ]
        return [value for value, _ in harness.loglikelihood(requests, disable_tqdm=True)]

    return scores


def ours(model, codec, pairs):
    return [score.log_prob for score in Scorer(model, codec).log_likelihoods(pairs)]


@pytest.mark.parametrize("adds", ["", END, f"{END} {END}"])
def test_the_tokenizers_own_start_gives_the_harness_s_numbers(model, backend, adds):
    tokenizer = tokenizer_that(adds)
    codec = PeerCodec(tokenizer)
    expected = backend(tokenizer, PAIRS + WRITTEN)
    assert ours(model, codec, PAIRS + WRITTEN) == pytest.approx(expected, abs=1e-4)
    starts = [context_ids(codec, text)[:-1] for text in ("a", f"{END}a")]
    assert starts == [[256] * adds.count(END), [256]]


def test_always_is_what_the_harness_gives_with_bos_written_out(model, backend):
    tokenizer = tokenizer_that("")
    expected = backend(tokenizer, [(END + context, choice) for context, choice in PAIRS if context])
    found = ours(model, PeerCodec(tokenizer, bos="always"), [pair for pair in PAIRS if pair[0]])
    assert found == pytest.approx(expected, abs=1e-4)
    without = ours(model, PeerCodec(tokenizer), [pair for pair in PAIRS if pair[0]])
    assert max(abs(one - other) for one, other in zip(found, without)) > 0.1


@pytest.mark.parametrize("bos", ["tokenizer", "always"])
def test_every_context_begins_as_the_codec_says(model, bos):
    """Of texts written on, RULER's prompts, rows of pairs and whole texts."""
    small = {"ruler_lengths": (512,), "ruler_samples": 1, "mqar_pairs": (2,), "mqar_length": (16,)}
    codec, starts = PeerCodec(tokenizer_that(""), bos=bos), set()

    def look(module, _, given):
        rows = given["input_ids"].tolist() if given.get("past_key_values") is None else []
        starts.update(row[0] == 256 for row in rows if any(row))  # rows of zeros measure a state

    peer = Subject(
        name="peer", model=model, tokenizer=codec, digest="", tokenizer_digest="", device=model.device
    )
    hook = model.inner.register_forward_pre_hook(look, with_kwargs=True)
    for name in ("niah_single_1", "mqar"):
        assert get_task(name).run(peer, EvalConfig(**small, mqar_samples=2), False)["samples"]
        assert starts == {bos == "always"}, name
    Scorer(model, codec).generate([context_ids(codec, "def ")], Sampling(max_tokens=1))
    hook.remove()
    assert starts == {bos == "always"}
    expected = ours(model, codec, [("", "whole text")])
    assert [score.log_prob for score in Scorer(model, codec).rolling(["whole text"])] == expected


def test_a_tokenizer_whose_own_start_cannot_be_told_is_refused_with_the_remedy():
    raw = raw_tokenizer()
    tokenizer = fast_tokenizer(raw)
    encode = tokenizer.encode
    tokenizer.encode = lambda text, add_special_tokens=True, **options: (
        [1, 2, 3] if add_special_tokens else encode(text, add_special_tokens=False, **options)
    )
    with pytest.raises(ValueError, match=r'NAME encodes a text .* set evals\.peer_bos = "always"'):
        PeerCodec(tokenizer, name="NAME")
    assert PeerCodec(tokenizer, bos="always").start([7]) == [256]


def test_the_setting_is_part_of_a_results_key(tmp_path):
    save_peer(tmp_path / "peer")
    first, always = (load_peer(tmp_path / "peer", device="cpu", bos=bos) for bos in ("tokenizer", "always"))
    assert first.digest == always.digest
    assert first.tokenizer_digest != always.tokenizer_digest
    assert (first.tokenizer.start([7]), always.tokenizer.start([7])) == ([], [256])
    assert torch.equal(*(subject.model.inner.lm_head.weight for subject in (first, always)))

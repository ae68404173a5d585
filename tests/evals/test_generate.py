"""Text is passed on as soon as it is certain and never taken back; prompts are read from files."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from evals.generate import as_json, generate, read_prompts
from evals.sampling import Sampling
from evals.scorer import Scorer
from evals.subject import Subject
from evals.writing import TextStream, Written
from tests.evals.fakes import ByteTokenizer, RecurrentModel

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
TEXT = "caf\u00e9 \U0001f600\u4e2d \ufffd stop|| sto|stop" * 2


class PieceTokenizer(ByteTokenizer):
    """Also pieces of two bytes, cut anywhere: id 300 + place."""

    def __init__(self, text=TEXT):
        data = text.encode()
        self.pieces = [data[i : i + 2] for i in range(0, len(data), 2)]
        self.vocab_size = 300 + len(self.pieces)
        self.decoded = 0

    def decode(self, ids):
        self.decoded += len(ids)
        parts = [self.pieces[i - 300] if i >= 300 else bytes([i]) for i in ids if i < 256 or i >= 300]
        return b"".join(parts).decode(errors="replace")


def by_decoding_everything(tokenizer, ids, stop):
    """The text that may be shown after each token, and where it ends: decoded anew for each token."""
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:count])
        places = [text.find(s) for s in stop if s in text]
        if places:
            return text[: min(places)], count
    return text.rstrip(UNFINISHED), len(ids)


def streamed(tokenizer, ids, stop):
    stream, shown = TextStream(tokenizer, stop), []
    for count, token in enumerate(ids, 1):  # noqa: B007
        shown.append(stream.add(token))
        if stream.stopped:
            break
    shown.append(stream.end())
    assert "".join(shown) == stream.text
    return shown, count


STOPS = [(), ("stop",), ("||", "stop|"), ("o",), ("\U0001f600", "\u4e2d s"), (" sto|sto",)]


@pytest.mark.parametrize("stop", STOPS)
def test_what_was_shown_is_the_decoded_text_up_to_the_stop(stop):
    tokenizer, rng = PieceTokenizer(), random.Random(0)
    for trial in range(150):
        if trial % 2:  # sound text, in pieces of one or two bytes
            data, ids = TEXT.encode()[trial % 7 * 2 :], []
            while data:
                size = rng.choice([1, 2]) if data[:2] in tokenizer.pieces else 1
                ids.append(300 + tokenizer.pieces.index(data[:2]) if size == 2 else data[0])
                data = data[size:]
        else:  # much of it no text at all
            ids = [rng.choice([*range(120, 256), *b"stop| ", *range(300, 330)]) for _ in range(40)]
        shown, count = streamed(tokenizer, ids, stop)
        expected, ends = by_decoding_everything(tokenizer, ids, stop)
        assert "".join(shown).rstrip(UNFINISHED) == expected.rstrip(UNFINISHED)
        assert count == ends


def test_no_half_character_and_no_start_of_a_stop_string_is_shown():
    tokenizer = ByteTokenizer()
    shown, _ = streamed(tokenizer, list("a\u00e9\U0001f600 st s|stop".encode()), ("stop",))
    assert shown == [
        "a",
        "",
        "\u00e9",
        "",
        "",
        "",
        "\U0001f600",
        " ",
        "",
        "",
        "st ",
        "",
        "s|",
        "",
        "",
        "",
        "",
        "",
    ]
    shown, _ = streamed(tokenizer, list(b"ab st"), ("stop",))
    assert shown == ["a", "b", " ", "", "", "st"]  # kept back until nothing followed
    shown, _ = streamed(tokenizer, list("ab\U0001f600".encode())[:-1], ())
    assert shown == ["a", "b", "", "", "", ""]  # an unfinished character is never shown


def test_a_stop_string_is_found_as_soon_as_it_is_complete_within_a_piece():
    tokenizer = PieceTokenizer("stop\u00e9")  # st|op|..
    ids = [300, 301, *"!\u00e9".encode()[:2], 120]
    assert streamed(tokenizer, ids, ("sto",))[1] == 2
    mixed = PieceTokenizer("x\u00e9")  # "x" with half a character
    assert streamed(mixed, [300, 301], ("x",)) == (["", ""], 1)


def test_a_long_text_costs_the_same_per_token_all_along():
    for ids in (list(TEXT.encode()) * 40, [200] * 2000):  # the second is no text: every byte stays open
        tokenizer = PieceTokenizer()
        shown, _ = streamed(tokenizer, ids, ("nowhere",))
        assert tokenizer.decoded < 15 * len(ids)
        assert len("".join(shown)) > 0


# --- many prompts


@pytest.fixture
def subject():
    return Subject(
        name="fake",
        model=RecurrentModel(seed=2),
        tokenizer=ByteTokenizer(),
        digest="",
        tokenizer_digest="",
        device=torch.device("cpu"),
    )


def test_texts_as_they_come_make_up_the_whole(subject):
    prompts = ["one", "another prompt, longer", "", "one"]
    sampling = Sampling(max_tokens=25, temperature=1.0, seed=3, stop=("e",))
    shown = dict.fromkeys(range(4), "")

    def add(place, text):
        shown[place] += text

    written = generate(subject, prompts, sampling, on_text=add)
    assert [shown[place] for place in range(4)] == [item.text for item in written]
    scorer, bos = Scorer(subject.model, subject.tokenizer), subject.tokenizer.bos_id
    ids = [[bos, *prompt.encode()] for prompt in prompts]
    assert [item.text for item in written] == scorer.generate(ids, sampling)
    assert written[0].text != written[3].text  # equal prompts, streams of their own
    assert generate(subject, ["another prompt, longer"], sampling)[0].text == written[1].text


def test_how_a_text_ended_and_how_fast_it_came(subject):
    free = generate(subject, ["go"], Sampling(max_tokens=12, temperature=1.0))[0]
    assert (free.finish, len(free.tokens)) == ("length", 12)
    assert free.seconds > 0
    stop = chr(free.tokens[3]) if free.tokens[3] < 128 else free.text[2]
    stopped = generate(subject, ["go"], Sampling(max_tokens=12, temperature=1.0, stop=(stop,)))[0]
    assert (stopped.finish, stop in stopped.text) == ("stop", False)
    model = subject.model
    model.outputs.data[:, subject.tokenizer.eos_id] = 1e3 * torch.sign(model.outputs.data[:, 0])
    ended = [generate(subject, [p], Sampling(max_tokens=200, temperature=2.0))[0] for p in "abcdef"]
    assert "eos" in {item.finish for item in ended}
    assert all(subject.tokenizer.eos_id not in item.tokens for item in ended)
    none = generate(subject, ["go"], Sampling(max_tokens=0))[0]
    assert (none.text, none.tokens, none.finish) == ("", (), "length")
    line = as_json("p", Written(text="t", tokens=(1, 2, 3), finish="stop", seconds=0.5))
    assert line == {"prompt": "p", "text": "t", "tokens": 3, "finish": "stop", "tokens_per_second": 6.0}
    assert as_json("p", replace(none, seconds=0.0))["tokens_per_second"] is None


def test_prompts_are_read_from_lines_and_from_json(tmp_path):
    plain, lines = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    plain.write_text(" one \n\ntwo\u2028still two\r\n", encoding="utf-8")
    assert read_prompts(["zero"], plain) == ["zero", " one ", "two\u2028still two"]
    lines.write_text('{"prompt": "a\\nb", "more": 1}\n\n{"prompt": ""}\n')
    assert read_prompts([], lines) == ["a\nb", ""]


@pytest.mark.parametrize("line", ['{"text": "a"}', "plain", "[1]", '{"prompt": 3}', "3"])
def test_a_line_that_is_no_prompt_is_named(tmp_path, line):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n' + line)
    with pytest.raises(ValueError, match=r"prompts.jsonl, line 2: write \{\"prompt\""):
        read_prompts([], file)
    with pytest.raises(ValueError, match="no prompt: give --prompt TEXT"):
        read_prompts([])
    file.with_suffix(".txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"prompts\.txt: not UTF-8"):
        read_prompts([], file.with_suffix(".txt"))

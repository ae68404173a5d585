"""TTT-linear: its dual form against a loop over tokens, mini-batches entered inside, and fla's form."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import PackedLayout
from kernels.baselines.grid import Memory
from kernels.baselines.ttt import ttt_linear
from tests.kernels.baselines.driver import Case, check, leaves, normal

HEADS, WIDTH = 2, 4


def norm(z: Tensor, weights: dict[str, Tensor]) -> Tensor:
    centred = z - z.mean()
    return centred / (centred.square().mean() + 1e-6).sqrt() * weights["norm_weight"] + weights["norm_bias"]


def heads_norm(z: Tensor, weights: dict[str, Tensor]) -> Tensor:
    per_head = torch.func.vmap(norm, in_dims=(0, 0))
    return torch.stack([per_head(x, weights) for x in z.flatten(0, 1).to(torch.float64)]).view_as(z).to(z)


def loop(
    tokens: dict[str, Tensor], weights: dict[str, Tensor], memory: Memory, *, offset: int, chunk: int
) -> tuple[Tensor, Memory]:
    """Token by token, gradients by autograd of the inner loss at the mini-batch's start."""
    (state, begun), scale, outputs = memory, weights["slot_scale"], []
    for t, slot in enumerate(range(offset, offset + len(tokens["q"]))):
        q, k, v, step = (tokens[name][t] for name in ("q", "k", "v", "step"))
        if slot % chunk == 0:
            begun = torch.zeros_like(state)

        def loss(state: Tensor, k: Tensor = k, v: Tensor = v) -> Tensor:
            return (k + norm(k @ state[:-1] + state[-1], weights) - v).square().sum() / 2

        begun = begun + step * torch.func.grad(loss)(state)
        now = state - scale[slot % chunk] * begun
        outputs.append(q + norm(q @ now[:-1] + now[-1], weights))
        if slot % chunk == chunk - 1:
            state, begun = now, torch.zeros_like(begun)
    return torch.stack(outputs), (state, begun)


def drawing(chunk: int) -> Callable[..., tuple[dict[str, Tensor], dict[str, Tensor]]]:
    def draw(generator: torch.Generator, batch: int, length: int) -> tuple[dict[str, Tensor], ...]:
        shape = (batch, length, HEADS)
        tokens = {name: normal(generator, *shape, WIDTH) for name in ("q", "k", "v")}
        tokens["step"] = torch.sigmoid(normal(generator, *shape)) / WIDTH
        weights = {
            "norm_weight": 1 + 0.3 * normal(generator, HEADS, WIDTH),
            "norm_bias": 0.3 * normal(generator, HEADS, WIDTH),
            "slot_scale": 1 / (1 + torch.arange(chunk)) + 0.1 * normal(generator, HEADS, chunk).abs(),
        }
        return tokens, weights

    return draw


def memory(generator: torch.Generator, documents: int) -> Memory:
    shape = (documents, HEADS, WIDTH + 1, WIDTH)
    return normal(generator, *shape), 0.2 * normal(generator, *shape)


@pytest.mark.parametrize(
    ("lengths", "packed", "chunk", "offset"),
    [
        ([8, 8], False, 4, 0),
        ([7, 7], False, 4, 0),
        ([1, 9, 4, 2], True, 4, 0),
        ([5], False, 1, 0),
        ([3], False, 8, 0),
        ([9, 9], False, 4, 3),
        ([1, 7, 3, 2], True, 4, 1),
        ([2, 2], False, 8, 5),
    ],
)
def test_mini_batches_give_what_tokens_give(lengths, packed, chunk, offset):
    """Where the offset is 0 the gradient of the second memory is 0: no mini-batch has begun."""
    definition = functools.partial(loop, offset=offset, chunk=chunk)
    case = Case(ttt_linear, definition, drawing(chunk), memory)
    check(case, lengths, packed=packed, chunk=chunk, offset=offset)


@pytest.mark.parametrize("cut", [1, 3, 4, 6, 8, 10])
def test_a_sequence_cut_anywhere_goes_on_as_the_whole(cut):
    """Outputs, the last memories and the gradients of what came before the cut; bitwise at mini-batches."""
    generator, length, chunk = torch.Generator().manual_seed(0), 11, 4
    tokens, weights = drawing(chunk)(generator, 2, length)
    first, begun = memory(generator, 2)
    results = []
    for bounds in ((0, length), (0, cut, length)):
        xs = leaves([*tokens.values(), first])
        state, outputs = (xs[-1], torch.full_like(begun, torch.nan)), []
        for begin, end in itertools.pairwise(bounds):
            piece = {name: x[:, begin:end] for name, x in zip(tokens, xs, strict=False)}
            layout = PackedLayout.uniform(2, end - begin, chunk, offset=begin % chunk)
            y, state = ttt_linear(piece, weights, state, layout)
            outputs.append(y)
        loss = torch.cat(outputs, dim=1).square().sum() + sum(x.square().sum() for x in state)
        results.append(([torch.cat(outputs, dim=1), *state], torch.autograd.grad(loss, xs)))
    (whole, gradients), (pieces, theirs) = results
    if cut % chunk == 0:
        assert all(torch.equal(*pair) for pair in zip(whole, pieces, strict=True))
    torch.testing.assert_close(pieces, whole, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(theirs, gradients, atol=1e-11, rtol=1e-11)


def test_documents_with_offsets_of_their_own():
    """One in the middle of a mini-batch beside one that begins: the second's sums are not read."""
    generator, chunk = torch.Generator().manual_seed(1), 4
    tokens, weights = drawing(chunk)(generator, 1, 12)
    entering = memory(generator, 2)
    y, final = ttt_linear(tokens, weights, entering, PackedLayout.of((5, 7), chunk, offsets=(0, 3)))
    for n, here, offset in ((0, slice(0, 5), 0), (1, slice(5, 12), 3)):
        alone = {name: x[:, here] for name, x in tokens.items()}
        own = tuple(x[n : n + 1] for x in entering)
        layout = PackedLayout.uniform(1, here.stop - here.start, chunk, offset=offset)
        expected, last = ttt_linear(alone, weights, own, layout)
        torch.testing.assert_close(y[:, here], expected, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close([x[n : n + 1] for x in final], [*last], atol=1e-12, rtol=1e-12)


def test_the_naive_form_of_flash_linear_attention_agrees():
    """With one step for all tokens and one scale for all slots, where both definitions are one.

    Theirs computes in fp32, overwrites q and pads the last mini-batch, so its last state is of whole ones.
    """
    from fla.ops.ttt.naive import chunk_ttt_linear_ref

    generator, chunk, length = torch.Generator().manual_seed(3), 4, 12
    tokens, weights = drawing(chunk)(generator, 2, length)
    tokens["step"] = torch.full_like(tokens["step"], 0.1)
    weights["slot_scale"] = torch.ones_like(weights["slot_scale"])
    first, begun = memory(generator, 2)
    y, (final, _) = ttt_linear(tokens, weights, (first, begun), PackedLayout.uniform(2, length, chunk))
    q, k, v = (tokens[name].float() for name in ("q", "k", "v"))
    theirs, w, b = chunk_ttt_linear_ref(
        q.clone(), k, v, weights["norm_weight"], weights["norm_bias"], tokens["step"][..., None].float(),
        scale=1.0, mini_batch_size=chunk, initial_state=first[:, :, :-1].float(),
        initial_state_bias=first[:, :, -1:].float(), output_final_state=True,
    )  # fmt: skip
    # Theirs adds what it normalises, W q + b, where the authors add q.
    normed = y.float() - q
    torch.testing.assert_close(heads_norm(theirs - normed, weights), normed, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.cat([w, b], dim=-2), final.float(), atol=1e-4, rtol=1e-4)

"""torch.compile(fullgraph=True): one graph, the same bits as without it, and few compilations.

What is compiled again: anything when one of its sizes first changes (then the size is a symbol, except where
it is 0 or 1), attention layers for every number of packed documents (they attend document by document), and
``loss_sum`` for every number of tokens (its loop over blocks of logits is unrolled). What is not captured:
``packed_context``, which reads boundaries (``LanguageModel.documents`` calls it beforehand), checks of tokens
and gates, and the transfers of ``parallel.sequence``.
"""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from trellis_dist.models.context import SequenceContext

CORRECTED = {"update": "corrected", "phi": "tanh", "readout": "silu_rms", "value_gates": "own"}
WHOLE = SequenceContext()


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def small(tiny):
    """Builds an fp32 model, so that matrix products go the way they go in training."""
    return lambda **options: tiny(dtype=torch.float32, dim=32, **options)


def activations(length=64, seed=0):
    return torch.randn(1, length, 32, generator=torch.Generator().manual_seed(seed))


def block_results(block, function, context, x):
    """Output and every gradient of ``function(x, context)``, which runs ``block``."""
    x = x.clone().requires_grad_()
    block.zero_grad()
    y = function(x, context)
    y.float().square().sum().backward()
    return [y.detach(), x.grad, *(parameter.grad.clone() for parameter in block.parameters())]


def loss_results(model, function, *args, **kwargs):
    model.zero_grad()
    loss = function(*args, **kwargs)
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


def assert_same_bits(ours, expected):
    assert len(ours) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def packing(model, bounds):
    return model.documents(torch.tensor(bounds), rows=1, length=bounds[-1])


def test_a_block_at_any_length_takes_two_compilations(small):
    block = small().blocks[0]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    for length in (64, 48, 37, 52):
        x = activations(length)
        assert_same_bits(block_results(block, compiled, WHOLE, x), block_results(block, block, WHOLE, x))
    assert counter.frame_count == 2


def test_another_packing_is_another_input_and_not_another_graph(small):
    model = small(trellis={"learned_initial_memory": True})
    block, x = model.blocks[0], activations()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    for bounds, compilations in (
        ([0, 10, 40, 64], 1),
        ([0, 30, 41, 64], 1),
        ([0, 7, 13, 50, 64], 2),
        ([0, 1, 5, 9, 20, 31, 64], 2),
    ):
        context = packing(model, bounds)
        ours = block_results(block, compiled, context, x)
        assert_same_bits(ours, block_results(block, block, context, x))
        assert counter.frame_count == compilations


def test_the_loss_of_a_hybrid_model(small, tokens):
    model = small(pattern=("trellis", "attention"))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model.loss_sum, backend=counter, fullgraph=True)
    x, labels = tokens(2, 32), tokens(2, 32, seed=1)
    labels[0, :5] = -100
    for bounds, compilations in (
        (None, 1),
        ([0, 10, 40, 64], 2),
        ([0, 20, 45, 64], 3),  # the lengths, by which attention cuts, become symbols
        ([0, 3, 50, 64], 3),
    ):
        documents = None if bounds is None else model.documents(torch.tensor(bounds), rows=2, length=32)
        ours = loss_results(model, compiled, x, labels, cu_seqlens=documents, z_loss=1e-3)
        expected = loss_results(model, model.loss_sum, x, labels, cu_seqlens=documents, z_loss=1e-3)
        assert_same_bits(ours, expected)
        assert counter.frame_count == compilations


def test_autocast(small):
    block, x = small(trellis=CORRECTED).blocks[0], activations()

    def under_autocast(function):
        def call(x, context):
            with torch.autocast("cpu", torch.bfloat16):
                return function(x, context)

        return call

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    expected = block_results(block, under_autocast(block), WHOLE, x)
    assert_same_bits(block_results(block, under_autocast(compiled), WHOLE, x), expected)
    full = block_results(block, block, WHOLE, x)
    assert all(g.dtype == torch.float32 for g in expected[1:])
    assert 1e-4 < (expected[0] - full[0]).norm() / full[0].norm() < 0.05  # bf16 it was


def test_activation_checkpointing_inside_and_outside_a_graph(small):
    block, x = small().blocks[0], activations()

    def checkpointed(function):
        return lambda x, context: checkpoint(function, x, context, use_reentrant=False)

    inside = torch.compile(checkpointed(block), backend="aot_eager", fullgraph=True)
    outside = checkpointed(torch.compile(block, backend="aot_eager", fullgraph=True))
    expected = block_results(block, block, WHOLE, x)
    for function in (checkpointed(block), inside, outside):
        assert_same_bits(block_results(block, function, WHOLE, x), expected)


def inductor_runs_here():
    """Whether there is what inductor needs on a CPU: a C++ compiler and Python's headers."""
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return shutil.which("g++") is not None and headers.is_file()


def test_a_block_under_inductor(small):
    """To 1e-4 in fp32 (measured: 1e-5): inductor fuses, so it rounds elsewhere."""
    block, x = small(trellis=CORRECTED).blocks[0], activations()
    # Where it does not run, its graph is still captured.
    backend = "inductor" if inductor_runs_here() else "aot_eager"
    compiled = torch.compile(block, backend=backend, fullgraph=True)
    ours, expected = (block_results(block, function, WHOLE, x) for function in (compiled, block))
    for a, b in zip(ours, expected, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()

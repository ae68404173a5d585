"""The halo convolution against the dense one in fp64, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.largest import largest
from tests.parallel.cases import counted_sends, gradients_of, leaf, mesh_of, ranks, segment
from trellis_dist.models.context import packed_context
from trellis_dist.models.conv import causal_conv
from trellis_dist.parallel.halo import HaloConvolution
from trellis_dist.parallel.segments import Segments
from trellis_dist.parallel.transfers import Transfers

ROWS, LENGTH, WIDTH, CHUNK = 2, 32, 6, 2


def parity(sp: int, kernel: int, starts: list[int] | None) -> dict[str, float]:
    mesh = mesh_of(sp)
    generator = torch.Generator().manual_seed(1)
    x, up = (torch.randn(ROWS, LENGTH, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))
    weight = torch.randn(WIDTH, kernel, generator=generator, dtype=torch.float64)
    bounds = None if starts is None else torch.tensor([*starts, ROWS * LENGTH])

    def run(convolution, x, up, bounds):
        x, w, edges = leaf(x), leaf(weight), None
        flat = x
        if bounds is not None:
            rows, length = x.shape[:2]
            edges = packed_context(
                bounds, rows=rows, length=length, chunk_sizes=[CHUNK], conv_kernel=kernel
            ).edges
            flat = x.flatten(0, 1).unsqueeze(0)
        y = convolution(flat, w, edges=edges).view_as(up)
        return y, *gradients_of((y * up).sum(), [x, w])

    y, dx, dw = run(causal_conv, x, up, bounds)
    segments = Segments(mesh, chunk_size=CHUNK)
    marks = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH)
    _, _, local_bounds = segments.cut(marks, marks, bounds)
    convolution = HaloConvolution(causal_conv, Transfers(mesh), segments)
    with counted_sends() as sizes:
        y_local, dx_local, dw_local = run(convolution, segment(x, mesh), segment(up, mesh), local_bounds)
    dist.all_reduce(dw_local, group=mesh.sp_group)
    inner = (mesh.left is not None) + (mesh.right is not None)
    return {
        "y": float((y_local - segment(y, mesh)).abs().max()),
        "dx": float((dx_local - segment(dx, mesh)).abs().max()),
        "dw": float((dw_local - dw).abs().max()),
        "bytes": sum(sizes) - inner * ROWS * (kernel - 1) * WIDTH * 8,
    }


@pytest.mark.parametrize("sp", [2, 4])
@pytest.mark.parametrize(
    ("kernel", "starts"),
    [
        (4, None),
        (2, None),
        (1, None),
        (9, None),
        (4, [0, 32]),
        (4, [0, 2, 14, 16, 18, 32, 40, 46]),
        (3, [0, 8, 16]),
    ],
)
def test_halo_convolution_is_the_dense_one(sp: int, kernel: int, starts: list[int] | None):
    for differences in ranks().run(parity, sp, kernel, starts):
        assert largest(differences.values()) < 1e-12, differences
        assert differences["bytes"] == 0


def nan_across_documents() -> bool:
    """A document starts at each segment; the inputs before it are NaN. Is any output or gradient?"""
    mesh = mesh_of(2)
    segments = Segments(mesh, chunk_size=CHUNK)
    tokens = torch.zeros(1, 16, dtype=torch.int64)
    segments.cut(tokens, tokens, torch.tensor([0, 8, 16]))
    x = leaf(torch.full((1, 8, WIDTH), float("nan") if mesh.left is None else 1.0))
    weight = leaf(torch.ones(WIDTH, 4))
    y = HaloConvolution(causal_conv, Transfers(mesh), segments)(
        x, weight, tail=torch.full((1, 3, WIDTH), 9.0)
    )
    dx, dw = gradients_of(y.sum(), [x, weight])
    if mesh.left is None:
        return bool(dx.isnan().any())
    return bool(torch.cat([part.flatten() for part in (y, dx, dw)]).isnan().any()) or float(y.max()) > 4


def test_not_even_a_nan_or_a_tail_reaches_another_document():
    assert ranks().run(nan_across_documents) == [False] * 4


def too_short() -> str:
    mesh = mesh_of(4)
    convolution = HaloConvolution(causal_conv, Transfers(mesh), Segments(mesh, chunk_size=1))
    try:
        convolution(torch.zeros(1, 2, 3), torch.zeros(3, 4))
    except ValueError as error:
        return str(error)
    return ""


def test_a_segment_shorter_than_the_reach_is_refused():
    assert all("a segment of 2 tokens is shorter than the 3" in text for text in ranks().run(too_short))

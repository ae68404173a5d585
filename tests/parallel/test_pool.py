"""The pool of gloo ranks itself: results, exceptions, deaths and hangs."""

import os

import pytest
import torch
import torch.distributed as dist

from tests.distributed import RankError, gloo_pool


def add_rank(x: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(x)
    return x + dist.get_rank()


def fail_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("only here")
    dist.barrier()


def fail_everywhere() -> None:
    raise ValueError(f"rank {dist.get_rank()} says no")


def die_on_rank_one() -> None:
    if dist.get_rank() == 1:
        os._exit(3)
    dist.barrier()


def wait_for_nobody() -> None:
    if dist.get_rank() == 0:
        dist.recv(torch.empty(1), src=1)


def process_id() -> int:
    return os.getpid()


def test_results_come_back_in_rank_order_from_the_same_processes():
    first = gloo_pool(2).run(process_id)
    results = gloo_pool(2).run(add_rank, torch.tensor([2.0]))
    assert [float(x) for x in results] == [4.0, 5.0]
    assert gloo_pool(2).run(process_id) == first


def test_an_error_on_every_rank_is_reported_and_the_pool_lives_on():
    before = gloo_pool(2).run(process_id)
    with pytest.raises(RankError, match=r"(?s)rank 0 raised.*rank 0 says no.*rank 1 raised.*rank 1 says no"):
        gloo_pool(2).run(fail_everywhere)
    assert gloo_pool(2).run(process_id) == before


def test_a_hang_is_killed_in_time_with_stacks_and_the_next_case_gets_new_ranks():
    pool = gloo_pool(2)
    # Killed any later, after gloo's own 30 s, rank 0 would have raised instead.
    with pytest.raises(RankError, match=r"(?s)rank 0 did not finish.*wait_for_nobody"):
        pool.run(wait_for_nobody, timeout_s=2.0)
    assert not pool.alive
    # One start serves the three failures below: each of them ends the pool it is given.
    with pytest.raises(
        RankError, match=r"(?s)rank 0 .*fail_on_rank_one.*rank 1 raised.*ValueError: only here"
    ):
        gloo_pool(2).run(fail_on_rank_one)


def test_a_rank_that_dies_is_named():
    with pytest.raises(RankError, match="rank 1 did not finish"):
        gloo_pool(2).run(die_on_rank_one)
    # Whether the survivor raised or hung, no later case may be given the dead rank's pool.
    assert gloo_pool(2).run(process_id)

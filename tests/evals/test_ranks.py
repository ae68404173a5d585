"""Scores do not depend on the number of ranks, the work is divided, and a failure is everybody's at once."""

from __future__ import annotations

import json
import shutil
import textwrap
from pathlib import Path

import pytest

from evals.ranks import Ranks, current_ranks
from evals.scorer import Scorer
from tests.distributed import gloo_pool
from tests.evals import rank_cases
from tests.evals.conftest import write_run
from tests.evals.fakes import RecurrentModel


@pytest.fixture(scope="module")
def alone():
    return rank_cases.alone()


@pytest.mark.parametrize("world_size", [2, 3])
def test_scores_are_bitwise_those_of_one_rank_and_the_reading_is_divided(alone, world_size):
    expected, whole = alone
    found = gloo_pool(world_size).run(rank_cases.scores)
    for scores, _ in found:
        assert scores == expected
    read = [tokens for _, tokens in found]
    assert sum(read) == whole
    assert max(read) < 0.75 * whole


def test_tasks_give_one_rank_s_results_and_only_rank_0_writes(dataset_dir, tmp_path):
    one = write_run(tmp_path / "one" / "tiny", dataset_dir)
    two = shutil.copytree(one, tmp_path / "two" / "tiny")
    text = tmp_path / "text.txt"
    text.write_bytes(Path(textwrap.__file__).read_bytes())
    expected, files, reused = rank_cases.tasks(str(one), str(tmp_path / "one" / "out"), str(text))
    assert reused
    arguments = (str(two), str(tmp_path / "two" / "out"), str(text))
    for result, written, known in gloo_pool(2).run(rank_cases.tasks, *arguments):
        assert result == expected
        assert (written, known) == (files, True)
    stored = json.loads((two / "evals" / "perplexity-step-7.json").read_text())
    assert stored["result"] == expected["perplexity"]
    assert [count for _, count in gloo_pool(2).run(rank_cases.writes)] == [1, 0]
    assert [value for value, _ in gloo_pool(2).run(rank_cases.writes)] == ["written", "written"]


FAILURES = {
    "in a piece": [
        "echo: another rank failed: rank 1: ValueError: piece 1 is bad",
        "ValueError: piece 1 is bad",
    ],
    "before the others' exchange": [
        "echo: another rank failed: rank 1: ValueError: could not load",
        "ValueError: could not load",
    ],
    "everywhere": ["ValueError: no such run", "ValueError: no such run"],
}


@pytest.mark.parametrize("where", FAILURES)
def test_a_failure_is_heard_by_all_and_said_by_one(where):
    found = gloo_pool(2).run(rank_cases.fails, where)
    assert [outcome for outcome, _, _ in found] == FAILURES[where]
    assert [says for _, says, _ in found] == ([True, False] if where == "everywhere" else [False, True])
    assert [after for _, _, after in found] == [[0, 1], [0, 1]]  # they are still in step


def test_a_result_that_cannot_travel_is_the_failure_of_its_rank():
    found = gloo_pool(2).run(rank_cases.fails, "unpicklable")
    assert found[0][0].startswith("echo: another rank failed: rank 1:")
    assert "pickle" in found[1][0]


def test_ranks_that_disagree_about_the_work_do_not_mix_it_up():
    assert all("AssertionError" in outcome for outcome in gloo_pool(2).run(rank_cases.state_budget_differs))


def test_batches_that_differ_are_refused_even_when_there_are_as_many():
    cuts = {0: [[0, 1], [2, 3]], 1: [[0], [1, 2, 3]]}
    pieces = {}

    class Alone(Ranks):
        def divide(self, count, work, *, costs=None):
            mine = pieces[self.rank] = [work(place) for place in range(count)]
            return [pieces[0][0], mine[1]] if self.rank else mine  # rank 0 does the first batch

    def each(rank):
        scorer = Scorer(RecurrentModel(), rank_cases.TOKENIZER, ranks=Alone(rank, 2))
        scorer._batches = lambda lengths: iter(cuts[rank])
        return scorer.each([[1], [2], [3], [4]], lambda prefix: [rest[0] for rest in prefix.rests])

    assert each(0) == [1, 2, 3, 4]
    with pytest.raises(RuntimeError, match="give every rank the same model"):
        each(1)
    cuts[1] = [[0, 1], [3, 2]]
    assert each(1) == [1, 2, 3, 4]  # each value goes to its own prompt


def test_without_a_group_there_is_one_rank():
    ranks = current_ranks()
    assert (ranks, ranks.is_main) == (Ranks(0, 1), True)
    assert ranks.together(lambda: "x") == ["x"]
    with pytest.raises(KeyError):
        ranks.together(lambda: {}["none"])
    order = []
    assert ranks.divide(3, lambda i: order.append(i) or i * i, costs=[1, 5, 3]) == [0, 1, 4]
    assert order == [1, 2, 0]  # the dearest first


def test_the_dearest_pieces_are_spread():
    shares = Ranks(0, 2)._shares([1, 9, 5, 4, 1])
    assert shares == [[1, 0], [2, 3, 4]]
    assert Ranks(0, 3)._shares([1.0] * 7) == [[0, 3, 6], [1, 4], [2, 5]]

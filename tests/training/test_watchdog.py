"""A hang ends the process with stacks; skipped updates end the run after a budget."""

import subprocess
import sys

import pytest

from trellis_dist.training.engines.base import StepResult
from trellis_dist.training.watchdog import DivergedError, SkipBudget

HANG = """
import time
from trellis_dist.training.watchdog import Watchdog
dog = Watchdog(first_step_s=30.0, step_s=0.3)
dog.arm(long=True)
dog.arm(long=False)
def wait_for_a_peer():
    time.sleep(20)
wait_for_a_peer()
"""

QUIET = """
from trellis_dist.training.watchdog import Watchdog
import time
dog = Watchdog(first_step_s=0.2, step_s=0.0)
dog.arm(long=True)
dog.arm(long=False)
time.sleep(0.4)
dog.disarm()
print("alive")
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_a_hanging_step_dumps_its_stacks_and_exits():
    result = run(HANG)
    assert result.returncode == 1
    assert "wait_for_a_peer" in result.stderr


def test_zero_switches_it_off_and_rearming_forgets_the_earlier_limit():
    result = run(QUIET)
    assert (result.returncode, result.stdout) == (0, "alive\n")


def test_the_budget_counts_consecutive_skips():
    budget = SkipBudget(2)
    bad, good = StepResult.judge(loss=float("nan"), grad_norm=1.0), StepResult.judge(loss=1.0, grad_norm=1.0)
    for step, result in enumerate([bad, bad, good, bad, bad], start=1):
        budget.note(step, result)
    with pytest.raises(
        DivergedError, match=r"3 updates in a row.*step 6: loss nan.*max_skipped_steps = 2"
    ) as e:
        budget.note(6, bad)
    # A run folder keeps its optimizer: the remedy must be one that the launcher accepts.
    assert "start again in another --run-dir with a lower optimizer.lr" in str(e.value)

"""A request to end is remembered; a repeat of it belongs to it, and a second request ends the process."""

from __future__ import annotations

import signal
import time

import pytest

from trellis_dist.training import termination
from trellis_dist.training.termination import TerminationRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_request_is_remembered_with_its_name_and_time(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in termination.SIGNALS]
    with TerminationRequest() as request:
        assert (request.received, request.name, request.waited) == (False, "", 0.0)
        signal.raise_signal(number)
        assert (request.received, request.name) == (True, number.name)
        time.sleep(0.01)
        assert 0.01 <= request.waited < 60
        signal.raise_signal(signal.SIGTERM)  # the same request, through the launcher
        assert request.name == number.name
    assert [signal.getsignal(each) for each in termination.SIGNALS] == before


def test_a_second_request_goes_to_whoever_listened_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(termination, "REPEAT_S", 0.0)
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with TerminationRequest() as request:
            signal.raise_signal(signal.SIGTERM)
            assert heard == []
            time.sleep(0.001)
            signal.raise_signal(signal.SIGTERM)
            assert (request.received, heard) == (True, [signal.SIGTERM])
    finally:
        signal.signal(signal.SIGTERM, before)

"""Our warnings are one line; those of others keep the place they come from."""

import warnings

from checkpoints.commit import CheckpointWarning
from launch.messages import show_warnings_plainly


def test_only_our_warnings_lose_their_source_line(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    show_warnings_plainly()
    ours = warnings.formatwarning("step-1 is damaged", CheckpointWarning, "state.py", 82, "x = 1")
    assert ours == "trellis: warning: step-1 is damaged\n"
    theirs = warnings.formatwarning("old", UserWarning, "other.py", 7, "y = 2")
    assert "other.py:7: UserWarning: old" in theirs

"""Scores as TensorBoard scalars at the training step, in the run's own log folder.

One task on one step is one event file, of a fixed name, that is replaced as a whole: a second attempt after a
crash leaves one point, not two (EventAccumulator shows every event that it reads, equal steps included).
The name sorts after the training's own files and by step: readers take files in that order, and the marker of
a resumed training, which hides later points that were read before it, does not reach these.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path

from trellis_dist.files import atomic_write

__all__ = ["events_file", "write_events"]


def events_file(run_dir: Path, task: str, step: int) -> Path:
    """Where the scalars of a task at a step are kept."""
    return run_dir / "tensorboard" / f"events.out.tfevents.eval-step-{step:08d}-{task}"


def write_events(path: Path, scalars: Mapping[str, float], *, step: int, time: float) -> None:
    """Replace the event file ``path`` by one of these scalars; without any there is none.

    Args:
        path: in a folder that may be missing.
        scalars: by tag; one that is not finite is left out, as in the run's own curves.
        step: of the training.
        time: seconds since 1970.

    Raises:
        OSError: it cannot be written.
    """
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    finite = {name: value for name, value in scalars.items() if math.isfinite(value)}
    if not finite:
        return
    buffer = io.BytesIO()
    records = RecordWriter(buffer)
    records.write(Event(wall_time=time, file_version="brain.Event:2").SerializeToString())
    for name, value in finite.items():
        summary = Summary(value=[Summary.Value(tag=name, simple_value=value)])
        records.write(Event(wall_time=time, step=step, summary=summary).SerializeToString())
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, buffer.getvalue())

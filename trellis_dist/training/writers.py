"""Where the measurements of a run go: JSON lines, TensorBoard events, Weights & Biases; one protocol for all.

sink            scalars of a row         histograms     on resume
JsonLines       every row, one line      no             drops the rows after the resumed step
TensorBoard     one tag per key          yes            hides the events after it
WandB           one chart per key        yes            the same W&B run goes on; what it has it keeps
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import secrets
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np
from numpy.typing import NDArray

from trellis_dist.files import atomic_write, read_json, write_json

__all__ = ["Histogram", "JsonLines", "Row", "Sink", "TensorBoard", "WandB", "check_wandb", "read_rows"]

Row = Mapping[str, float]
BINS = 32
FINISH_S = 30.0  # for what W&B still has to send


@dataclass(frozen=True)
class Histogram:
    """Counts of values between edges, with the sums that TensorBoard asks for.

    Attributes:
        edges: rising [n + 1]; the first bin takes its lower edge too.
        counts: [n].
        total, squares: sum of the values and of their squares.
    """

    edges: NDArray[np.float64]
    counts: NDArray[np.int64]
    total: float
    squares: float

    @classmethod
    def of(cls, values: NDArray[Any], *, bins: int = BINS) -> Histogram | None:
        """Of the finite ``values``, in equal bins from the least to the greatest; None without one."""
        finite = values[np.isfinite(values)].astype(np.float64).ravel()
        if not finite.size:
            return None
        counts, edges = np.histogram(finite, bins=bins, range=_range(finite))
        return cls(edges, counts, float(finite.sum()), float(np.square(finite).sum()))


def _range(values: NDArray[np.float64]) -> tuple[float, float]:
    """Least and greatest value; a little around them where they are (nearly) one."""
    low, high = float(values.min()), float(values.max())
    margin = max(abs(low), abs(high), 1e-30) * 1e-6
    return (low, high) if high - low > margin else (low - margin, high + margin)


class Sink(Protocol):
    """Somewhere a run's numbers go.

    Attributes:
        title: what it is called when it is lost.
        lasting: whether a write that failed says nothing of the next one; otherwise the sink is given up.
    """

    title: str
    lasting: bool

    def write(self, row: Row) -> None:
        """Take the scalars of ``row`` at its "step"; raises what the sink raises."""
        ...

    def histograms(self, step: int, named: Mapping[str, Histogram]) -> None:
        """Take histograms by tag at ``step``; a sink without a form for them does nothing."""
        ...

    def rewind(self, step: int) -> None:
        """Forget, as far as possible, what came after ``step``: the run goes on from there."""
        ...

    def close(self) -> None:
        """Flush and close; ``TimeoutError``, with what a user can do, when that takes too long."""
        ...


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics file (none without a file), less a line that a crash cut short."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


class JsonLines:
    """One JSON object per line, flushed per row. Non-finite numbers are written as null."""

    title, lasting = "metrics", True

    def __init__(self, path: Path, *, resumed_step: int) -> None:
        """Open for appending; rows after ``resumed_step`` are dropped, so that each step is there once."""
        self._path = path
        self._file: TextIO | None = None  # opened by the next row
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rewind(resumed_step)

    def write(self, row: Row) -> None:
        """Append one row; ``OSError`` when the disk refuses."""
        if self._file is None:
            self._file = self._path.open("a", encoding="utf-8")
        self._file.write(_line(row))
        self._file.flush()

    def histograms(self, step: int, named: Mapping[str, Histogram]) -> None:
        """Nothing: the file stays one line of numbers per row."""

    def rewind(self, step: int) -> None:
        """Drop the rows after ``step``; ``OSError`` when the disk refuses, and later rows follow them."""
        kept = [row for row in read_rows(self._path) if row.get("step", 0) <= step]
        atomic_write(self._path, "".join(_line(row) for row in kept))
        self.close()  # what is open is the file that was replaced

    def close(self) -> None:
        """Close the file; a row would open it again."""
        file, self._file = self._file, None
        if file is not None:
            file.close()


def _line(row: Mapping[str, Any]) -> str:
    def clean(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps({key: clean(value) for key, value in row.items()}) + "\n"


class TensorBoard:
    """Scalars under the names of the JSON rows; on resume TensorBoard hides events after the resumed step."""

    title, lasting = "TensorBoard events", False

    def __init__(self, folder: Path, *, resumed_step: int) -> None:
        """Open an event file in ``folder``."""
        self._folder = folder
        self._open(resumed_step)

    def _open(self, last: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Also for step 0: a start that was killed before its first checkpoint has left events.
        self._writer: Any = SummaryWriter(str(self._folder), purge_step=last + 1, flush_secs=20)

    def write(self, row: Row) -> None:
        """Add every key but ``step`` as a scalar at ``row["step"]``; once failed, always failing."""
        for key, value in row.items():
            if key != "step":
                self._writer.add_scalar(key, value, global_step=int(row["step"]))
        self._writer.flush()

    def histograms(self, step: int, named: Mapping[str, Histogram]) -> None:
        """Add each as it was counted."""
        for tag, one in named.items():
            self._writer.add_histogram_raw(
                tag,
                min=float(one.edges[0]),
                max=float(one.edges[-1]),
                num=int(one.counts.sum()),
                sum=one.total,
                sum_squares=one.squares,
                bucket_limits=one.edges[1:].tolist(),
                bucket_counts=one.counts.tolist(),
                global_step=step,
            )

    def rewind(self, step: int) -> None:
        """Go on in another file of events, which hides those after ``step``."""
        self._writer.close()
        self._open(step)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases. A run folder is one W&B run, whatever number of starts it takes.

    Its id is drawn once and kept in the folder: another folder of the same path, on another machine or
    after this one was deleted, is another run. W&B keeps what it was first told of a step, so a start that
    repeats steps adds nothing to them.
    """

    title, lasting = "W&B", False

    def __init__(self, run_dir: Path, *, project: str, config: Mapping[str, Any]) -> None:
        """Open the run of ``run_dir`` in ``project``; without a key in ``run_dir``/wandb, to be synced later.

        Raises:
            ImportError: the package is not installed.
            Exception: whatever W&B raises.
        """
        self._wandb: Any = importlib.import_module("wandb")
        if not _has_key():
            os.environ.setdefault("WANDB_MODE", "offline")
        whole = run_dir.resolve()
        self._folder = whole / "wandb"
        self._run: Any = self._wandb.init(
            project=project,
            name=whole.name,
            id=_kept_id(whole / "wandb_id.json"),
            resume="allow",
            dir=str(whole),
            config=dict(config),
        )

    def write(self, row: Row) -> None:
        """Log every key but ``step`` at ``row["step"]``."""
        self._run.log({key: value for key, value in row.items() if key != "step"}, step=int(row["step"]))

    def histograms(self, step: int, named: Mapping[str, Histogram]) -> None:
        """Log each as it was counted."""
        made = {
            tag: self._wandb.Histogram(np_histogram=(one.counts, one.edges)) for tag, one in named.items()
        }
        self._run.log(made, step=step)

    def rewind(self, step: int) -> None:
        """Nothing: W&B takes nothing back."""

    def close(self) -> None:
        """Send what is left; ``TimeoutError`` when that takes more than FINISH_S."""
        errors: list[Exception] = []

        def finish() -> None:
            try:
                self._run.finish()
            except Exception as error:
                errors.append(error)

        sending = threading.Thread(target=finish, name="wandb finish", daemon=True)
        sending.start()
        sending.join(FINISH_S)
        if sending.is_alive():
            raise TimeoutError(
                f"W&B has not taken everything within {FINISH_S:.0f} s: `wandb sync` of the newest folder in "
                f"{self._folder} sends it again"
            )
        if errors:
            raise errors[0]


def _kept_id(path: Path) -> str:
    """The W&B id of a run folder; a new one where it has none. Raises ``OSError``."""
    try:
        return str(read_json(path)["id"])
    except (OSError, ValueError, KeyError, TypeError):
        drawn = secrets.token_hex(8)
        write_json(path, {"id": drawn})
        return drawn


def check_wandb(project: str) -> None:
    """Refuse ``logging.wandb`` without the package. Raises ``ValueError``."""
    if project and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f'logging.wandb = "{project}", and the package wandb is not installed: pip install '
            "'trellis-dist[wandb]', or set logging.wandb = \"\""
        )


def _has_key() -> bool:
    """Whether W&B can sign in without asking."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    files = [Path.home() / name for name in (".netrc", "_netrc")]
    return any("api.wandb.ai" in path.read_text(errors="replace") for path in files if path.is_file())

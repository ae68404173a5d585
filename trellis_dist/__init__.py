"""Distributed pretraining for Trellis; importing this package is quick (no torch, no engine)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

__all__ = ["__version__"]

__version__ = "0.1.0"

# Top-level names that other published packages also use (`kernels` is Hugging Face's, `evals` OpenAI's).
_ROOMS = ("kernels", "data_pipeline", "checkpoints", "evals", "launch")


def _refuse_shadowed_rooms(checkout: Path) -> None:
    """Raise ``ImportError`` when a room's name would import somebody else's package."""
    for room in _ROOMS:
        try:
            spec = find_spec(room)
        except ValueError:  # a stub in sys.modules without a spec
            spec = None
        origin = spec.origin if spec is not None else None
        if origin is None or not Path(origin).resolve().is_relative_to(checkout):
            raise ImportError(
                f"trellis_dist: the name {room!r} imports {origin or 'nothing'}, not {checkout / room}; "
                f"uninstall the other package (pip uninstall {room}) or put {checkout} first on PYTHONPATH"
            )


_refuse_shadowed_rooms(Path(__file__).resolve().parents[1])

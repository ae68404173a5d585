"""What every room's configuration shares: strict parsing and one-line refusals."""

from __future__ import annotations

__all__ = ["STRICT", "require"]

# Read by pydantic when launch/recipe.py parses a section: a misspelt key is an error, not a default, and so
# is nan or inf, which TOML can write and most comparisons let through.
STRICT = {"extra": "forbid", "allow_inf_nan": False}


def require(condition: bool, message: str) -> None:
    """Raise ``ValueError(message)`` unless ``condition`` holds; the message names key, value and remedy."""
    if not condition:
        raise ValueError(message)

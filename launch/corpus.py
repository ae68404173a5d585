"""What ``--corpus`` means: a file or folder on this machine, or a pinned Hugging Face data set."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from trellis_dist.files import digest

__all__ = ["corpus_layer"]

_PINNED = re.compile(r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<subset>[\w.-]+))?@(?P<revision>[\w.-]+)")


def corpus_layer(corpus: str, *, recipe_name: str) -> dict[str, Any]:
    """Recipe table that replaces the source, and names run and data set after it so that nothing is mixed up.

    Args:
        corpus: an existing path, or ``NAME[:SUBSET]@REVISION``.

    Raises:
        FileNotFoundError: neither.
    """
    path = Path(corpus).expanduser()
    pinned = _PINNED.fullmatch(corpus)
    if path.exists():
        source: dict[str, Any] = {"kind": "path", "path": str(path.resolve())}
        label = path.resolve().stem
    elif pinned:
        source = {"kind": "huggingface", **{k: v for k, v in pinned.groupdict().items() if v}}
        label = pinned["name"].rsplit("/", 1)[-1]
    else:
        raise FileNotFoundError(
            f"--corpus {corpus}: no such file or folder; a Hugging Face data set is written NAME@COMMIT"
        )
    name = f"{recipe_name}-{re.sub(r'[^A-Za-z0-9]+', '-', label).strip('-') or 'text'}-{digest(source)[:8]}"
    return {"name": name, "data": {"directory": f"shards/{name}", "source": source}}

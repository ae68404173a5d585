"""An interpreter for nodes on which `trellis train` is a rank that does as a test says."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from tests.launch.rank_stand_in import MODULE


def write_python(folder: Path) -> str:
    """A program that is Python, except that the ranks of an agent it starts are `rank_stand_in`'s."""
    path = folder / "python"
    swap = 'words=(); for word in "$@"; do [[ $word != launch.cli ]] || word=' + MODULE
    path.write_text(f'#!/usr/bin/env bash\n{swap}; words+=("$word"); done\n')
    with path.open("a") as file:
        file.write(f'exec {shlex.quote(sys.executable)} "${{words[@]}}"\n')
    path.chmod(0o755)
    return str(path)

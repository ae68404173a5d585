"""Export for `transformers`: a folder that AutoModelForCausalLM and AutoTokenizer open; made without it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoints.export import SAVED, TOKENIZER, write_export
from checkpoints.reader import CheckpointReader
from trellis_dist.files import REAL, FileSystem
from trellis_dist.models.huggingface.folder import PREFIX, describing_files

__all__ = ["export_for_transformers"]


def export_for_transformers(
    checkpoint: Path,
    output: Path,
    *,
    tokenizer: Path,
    model_config: Mapping[str, Any],
    bos_id: int,
    eos_id: int,
    file_system: FileSystem = REAL,
) -> Path:
    """Write the weights of `checkpoint` and what describes them into the new folder `output`.

    The folder appears complete or not at all; its export.json has the SHA-256 of every file.

    Args:
        tokenizer: the data set's tokenizer.model.
        model_config: the model section of the recipe.
        bos_id, eos_id: the tokenizer's ids around a document.

    Raises:
        FileExistsError, FileNotFoundError, ValueError, OSError: as `checkpoints.export.export_model`.
    """
    reader = CheckpointReader(checkpoint)
    kinds = {
        str(reader.dtype(name)).removeprefix("torch.") for name in reader.names() if name.startswith(SAVED)
    }
    # Weights of several types are loaded as the widest of them.
    dtype = max(kinds, key=("bfloat16", "float16", "float32", "float64").index, default="float32")
    described = describing_files(model_config, bos_id=bos_id, eos_id=eos_id, dtype=dtype)
    contents = {**described, TOKENIZER: Path(tokenizer).read_bytes()}
    return write_export(reader, output, contents=contents, prefix=PREFIX, file_system=file_system)

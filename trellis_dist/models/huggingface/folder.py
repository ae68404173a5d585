"""What a folder for `transformers` holds besides weights and tokenizer; made without transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trellis_dist.files import canonical_json

__all__ = ["MODEL_TYPE", "PREFIX", "SECTION", "STUB", "STUB_FILE", "describing_files"]

MODEL_TYPE = "trellis"
# Of every weight's name: the language model is the attribute `model` of the class that transformers builds.
PREFIX = "model."
# Key of config.json that holds the model section of the recipe.
SECTION = "model_section"
ARCHITECTURE, CONFIGURATION, TOKENIZER = "TrellisForCausalLM", "TrellisLMConfig", "TrellisTokenizer"

STUB_FILE = "trellis_auto.py"
# Subclasses, and not the classes themselves: `save_pretrained` copies the file in which a class is written.
STUB = f'''"""Lets trust_remote_code=True find the classes of trellis-dist; there is no other code here."""

from data_pipeline import huggingface


class {CONFIGURATION}(huggingface.{CONFIGURATION}):
    pass


class {ARCHITECTURE}(huggingface.{ARCHITECTURE}):
    config_class = {CONFIGURATION}


class {TOKENIZER}(huggingface.{TOKENIZER}):
    pass
'''


def describing_files(section: Mapping[str, Any], *, bos_id: int, eos_id: int, dtype: str) -> dict[str, bytes]:
    """Name -> content of config.json, generation_config.json, tokenizer_config.json and the stub.

    Args:
        section: the model section of the recipe.
        bos_id, eos_id: ids put around a document. A prompt begins with BOS, as documents do; EOS also pads.
        dtype: torch's name of the weights' type, such as "float32".
    """
    module = STUB_FILE.removesuffix(".py")
    ids = {"bos_token_id": bos_id, "eos_token_id": eos_id, "pad_token_id": eos_id}
    config = {
        "architectures": [ARCHITECTURE],
        "auto_map": {
            "AutoConfig": f"{module}.{CONFIGURATION}",
            "AutoModelForCausalLM": f"{module}.{ARCHITECTURE}",
        },
        "dtype": dtype,
        "model_type": MODEL_TYPE,
        SECTION: dict(section),
        **ids,
    }
    tokenizer = {
        "auto_map": {"AutoTokenizer": [f"{module}.{TOKENIZER}", None]},
        "tokenizer_class": TOKENIZER,
    }
    contents = {
        "config.json": config,
        "generation_config.json": ids,
        "tokenizer_config.json": tokenizer,
    }
    return {name: canonical_json(value).encode() for name, value in contents.items()} | {
        STUB_FILE: STUB.encode()
    }

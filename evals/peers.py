"""Causal language models of Hugging Face, scored by the code that scores ours: opening their folders."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from evals.config import Device, PeerBos
from evals.peer_codec import PeerCodec
from evals.peer_model import PeerModel
from evals.subject import Subject
from trellis_dist.files import digest, read_json, sha256_file

__all__ = ["Dtype", "is_peer", "load_peer", "peer_digests"]

Dtype = Literal["float32", "bfloat16", "float16", "float64"]

CONFIG, WEIGHTS = "config.json", "*.safetensors"
TOKENIZER_CONFIG = "tokenizer_config.json"
# Weights in formats that run code when they are opened.
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_TOKENIZER_FILES = re.compile(
    r"(tokenizer|special_tokens|added_tokens|vocab|merges|spiece|sentencepiece).*"
    r"|tekken\.json|.*\.tiktoken|.*\.bpe\.model"
)
# Of a model beside its weights: what it is, and what it ends a text with.
_MODEL_FILES = (CONFIG, "generation_config.json")


def is_peer(path: Path) -> bool:
    """True for a folder as `transformers` writes models."""
    return (path / CONFIG).is_file()


def load_peer(
    path: Path | str,
    *,
    trust_remote_code: bool = False,
    device: Device = "auto",
    dtype: Dtype = "float32",
    bos: PeerBos = "tokenizer",
) -> Subject:
    """Open a local folder of AutoModelForCausalLM and AutoTokenizer; nothing is downloaded.

    Args:
        path: a folder with config.json and *.safetensors.
        trust_remote_code: run the Python files of that folder. Only ever a local user's explicit choice.
        device: "auto" takes a CUDA device when there is one.
        dtype: of weights and activations; part of the digest.
        bos: what starts a context, as `evals.peer_codec.PeerCodec`; part of the tokenizer's digest.

    Raises:
        ValueError: no such folder, pickled weights, weights that do not fill the model, code in the folder
            that is not trusted, or a model that `transformers` does not know.
    """
    path = Path(path)
    code = _check_folder(path, trust_remote_code)
    import transformers

    # Registers the classes of our own exports, which then need no code of their folder.
    import data_pipeline.huggingface  # noqa: F401
    from evals.runs import resolve_device

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    opened: Any
    try:
        opened = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), use_safetensors=True, output_loading_info=True, **options
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **options)
    except (OSError, KeyError, ImportError, AttributeError, TypeError, ValueError) as error:
        line = " ".join(str(error).split())
        raise ValueError(f"{path} is no causal language model of transformers: {line}") from error
    model, info = opened
    for kind in ("missing_keys", "mismatched_keys"):
        if found := sorted(map(str, info.get(kind) or ())):
            raise ValueError(
                f"{path}: {kind.replace('_keys', '')} weights ({found[0]}, {len(found)} in all): the folder "
                "does not hold what its config.json describes; load it as the class it was saved from"
            )
    codec = PeerCodec(tokenizer, end_ids=_end_ids(model), bos=bos, name=str(path))
    peer = PeerModel(model.to(resolve_device(device)).eval(), name=str(path))
    return _subject(path, peer, codec, dtype=dtype, bos=bos, code=code)


def _subject(
    path: Path, peer: PeerModel, codec: PeerCodec, *, dtype: Dtype, bos: PeerBos, code: bool
) -> Subject:
    weights, tokenizer = _digests(path, dtype=dtype, bos=bos, code=code)
    return Subject(
        name=path.resolve().name,
        model=peer,
        tokenizer=codec,
        digest=weights,
        tokenizer_digest=tokenizer,
        device=peer.device,
    )


def peer_digests(
    path: Path, *, trust_remote_code: bool = False, dtype: Dtype = "float32", bos: PeerBos = "tokenizer"
) -> tuple[str, str]:
    """Digests of the weights and of the tokenizer that `load_peer` will give its subject.

    Raises:
        ValueError: it would refuse the folder.
    """
    return _digests(path, dtype=dtype, bos=bos, code=_check_folder(path, trust_remote_code))


def _digests(path: Path, *, dtype: Dtype, bos: PeerBos, code: bool) -> tuple[str, str]:
    files = sorted(item for item in path.iterdir() if item.is_file())
    mine = [item for item in files if _TOKENIZER_FILES.fullmatch(item.name)]
    weights = [item for item in files if item.match(WEIGHTS) or item.name in _MODEL_FILES]
    weights += [item for item in files if code and item.suffix == ".py"]
    return (
        digest({"dtype": dtype, "files": {item.name: sha256_file(item) for item in weights}}),
        digest({"bos": bos, "files": {item.name: sha256_file(item) for item in mine}}),
    )


def _check_folder(path: Path, trust_remote_code: bool) -> bool:
    """Refuse what cannot or must not be opened; returns whether the folder's own code will run."""
    if not is_peer(path):
        raise ValueError(f"{path} is no model folder: it has no {CONFIG}; give a local folder, not a name")
    if not any(path.glob(WEIGHTS)):
        pickled = [item.name for kind in PICKLED for item in path.glob(kind)]
        if pickled:
            raise ValueError(
                f"{path} holds pickled weights ({pickled[0]}), which run code when they are opened: save the "
                "model with save_pretrained of a current transformers, which writes safetensors"
            )
        raise ValueError(f"{path} has no weights ({WEIGHTS})")
    config = _settings(path / CONFIG)
    if not trust_remote_code and not _is_known(config):
        raise ValueError(
            f"{path}: its model is code in the folder ({config.get('model_type')!r} is none of "
            "transformers'): read that code, and give --trust-remote-code to run it"
        )
    tokenizer = _settings(path / TOKENIZER_CONFIG) if (path / TOKENIZER_CONFIG).is_file() else {}
    return trust_remote_code and ("auto_map" in config or "auto_map" in tokenizer)


def _settings(path: Path) -> dict[str, Any]:
    """What a JSON file of a model folder sets. Raises ValueError: it holds no object."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no object of settings: save the model again with save_pretrained")
    return found


def _is_known(config: Mapping[str, Any]) -> bool:
    """Whether transformers has the model's class, ours included."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from trellis_dist.models.huggingface.folder import MODEL_TYPE

    return "auto_map" not in config or config.get("model_type") in [*CONFIG_MAPPING.keys(), MODEL_TYPE]


def _end_ids(model: Any) -> list[int]:
    """What the model's own settings end a text with."""
    settings = getattr(model, "generation_config", None)
    ids = getattr(settings, "eos_token_id", None)
    ids = getattr(model.config, "eos_token_id", None) if ids is None else ids
    return [] if ids is None else [int(id_) for id_ in (ids if isinstance(ids, list | tuple) else [ids])]

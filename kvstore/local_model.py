"""Causal language models on this machine: a Hugging Face folder or a GGUF file, as transformers loads them.

Nothing is downloaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging

DTYPES = ("bfloat16", "float16", "float32")
_LOAD_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)


class ModelUnusable(ValueError):
    """`str()` is one line for the user."""


def load_model(path: Path, dtype: str = "auto") -> tuple[Any, Any]:
    """(model, tokenizer). `dtype`: of DTYPES, or "auto": as the weights are kept, bfloat16 for GGUF.

    Raises ModelUnusable.
    """
    if dtype not in ("auto", *DTYPES):
        raise ModelUnusable(f"--dtype {dtype}: use one of auto, {', '.join(DTYPES)}")
    is_gguf = path.is_file() and path.suffix == ".gguf"
    if not is_gguf and not (path / "config.json").is_file():
        raise ModelUnusable(f"{path}: no model is there: pass a folder with a config.json, or a .gguf file")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    source, named = (path.parent, {"gguf_file": path.name}) if is_gguf else (path, {})
    options: dict[str, Any] = {"dtype": dtype}
    if is_gguf:  # without dequantize the weights stay packed
        packed = GgufConfig(dequantize=True)
        options = {"dtype": "bfloat16" if dtype == "auto" else dtype, "quantization_config": packed}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True, **named)
        model = AutoModelForCausalLM.from_pretrained(source, local_files_only=True, **named, **options)
    except _LOAD_ERRORS as error:
        reason = (" ".join(str(error).split()) or type(error).__name__)[:300]
        raise ModelUnusable(f"{path}: transformers cannot load this model: {reason}") from None
    return model, tokenizer

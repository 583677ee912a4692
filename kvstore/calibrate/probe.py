"""What a profile costs: the KL divergence of next-token distributions after coding a held-out prefix, and its bits.

The prefix is coded in chunks by the codec itself and read at each quality; its last TAIL_TOKENS tokens stay exact,
standing for those that an engine recomputes (recomputing them on the decoded prefix would differ little).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from kvstore.calibrate.capture import WindowKV, cache_of
from kvstore.calibrate.model import CHUNK_TOKENS, LoadedModel
from kvstore.calibrate.options import PROBE_TOKENS, TAIL_TOKENS, WINDOW_TOKENS
from kvstore.calibrate.weights import mean_kl
from kvstore.calibrate.work import Arrays
from kvstore_codec import Profile, arrays, decode, encode, inspect


def probe(
    loaded: LoadedModel, window: WindowKV, tokens: list[int], profile: Profile, qualities: Sequence[str]
) -> Arrays:
    """ "kl" in nats a token and "bits" an element, one of each for every quality, of one window."""
    following = tokens[WINDOW_TOKENS : WINDOW_TOKENS + PROBE_TOKENS]
    blobs = [
        encode(
            arrays.token_slice(window.kv(), first, first + CHUNK_TOKENS), window.layout, quality="high",
            first_position=first, profile=profile,
        )
        for first in range(0, WINDOW_TOKENS, CHUNK_TOKENS)
    ]  # fmt: skip
    rates = [inspect(blob).bits_per_element for blob in blobs]
    kl = []
    with torch.no_grad():
        reference = loaded.log_probabilities(cache_of(window.float_pairs()), following)
        for quality in qualities:
            restored = _restored(blobs, window, profile, quality)
            kl.append(mean_kl(reference, loaded.log_probabilities(cache_of(restored.float_pairs()), following)))
    return {
        "kl": np.array(kl),
        "bits": np.array([np.mean([rate[quality] for rate in rates]) for quality in qualities]),
    }


def _restored(blobs: Sequence[bytes], window: WindowKV, profile: Profile, quality: str) -> WindowKV:
    """The window with all but its tail decoded from `blobs`."""
    decoded = [decode(blob, window.layout, quality=quality, profile=profile) for blob in blobs]
    chunks = [[arrays.read(plane) for plane in arrays.planes(kv, window.layout)] for kv in decoded]
    planes = [np.concatenate(parts) for parts in zip(*chunks, strict=True)]
    for plane, exact in zip(planes, window.planes, strict=True):
        plane[-TAIL_TOKENS:] = exact[-TAIL_TOKENS:]
    return WindowKV(window.layout, planes)

"""How much the loss depends on each channel: the weights of the quantiser's error.

An error e in what one token cached raises the KL divergence of a following token's distribution by ½ Σᵢ Wᵢ eᵢ², with
W the diagonal of the Fisher information. W is measured over all cached tokens but the sinks, and again over *steady*
tokens: without drain tokens (which the codec quantises eight times finer) and without the tail (which an engine
recomputes). The two differ, a few tokens carry much of W, and their geometric mean serves both.

Two ways to measure it:

- gradients, of the loss of labels that the model itself draws, by one backward pass a window: Wᵢ of every channel;
- noise added to one plane at a time, by forward passes alone: one W a plane, nearly as good.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from kvstore.calibrate.capture import WindowKV, cache_of
from kvstore.calibrate.model import LoadedModel
from kvstore.calibrate.options import LOSS_TOKENS, WINDOW_TOKENS
from kvstore.calibrate.work import Arrays
from kvstore_codec import KVLayout
from kvstore_codec.api import SINK_POSITIONS
from kvstore_codec.profile import plane_channels

Float64s = npt.NDArray[np.float64]

#: share of a plane's mean weight that every channel gets, so that none is trusted to be harmless
REGULARISATION = 0.02
#: values need a finer grid than their gradients say: their weight is divided by this
VALUE_SCALE = 0.8
#: amplitude of probing noise in units of the plane's rms: −18 dB, where loss is still quadratic
NOISE_AMPLITUDE = 0.125
#: below this share of the model's mean weight a plane's own is not trusted (a plane whose gradients vanish)
_WEIGHT_FLOOR = 1e-9


def by_gradients(loaded: LoadedModel, window: WindowKV, tokens: list[int], seed: int) -> Arrays:
    """W of one window, "every" and "steady": float64 [elements of a token], planes one after another.

    Per plane and channel the mean over cached tokens of g²/LOSS_TOKENS, g the gradient of the summed loss of the
    following LOSS_TOKENS labels in un-rotated coordinates."""
    pairs = window.float_pairs()
    leaves = [tensor.requires_grad_(True) for pair in pairs for tensor in pair]
    following = tokens[WINDOW_TOKENS : WINDOW_TOKENS + LOSS_TOKENS]
    with torch.enable_grad():
        log_probabilities = loaded.log_probabilities(cache_of(pairs), following)
        drawn = torch.Generator().manual_seed(seed)
        labels = torch.multinomial(log_probabilities.detach().exp(), 1, generator=drawn)
        (-log_probabilities.gather(1, labels).sum()).backward()
    every, steady = [], []
    for plane, leaf in enumerate(leaves):
        assert leaf.grad is not None
        gradient = leaf.grad[0].permute(1, 0, 2).contiguous().numpy()
        energy = window.unrotated(plane, gradient).astype(np.float64) ** 2 / LOSS_TOKENS
        every.append(energy[SINK_POSITIONS:].mean(axis=0))
        steady.append(energy[window.steady_tokens(plane // 2)].mean(axis=0))
    return {"every": np.concatenate(every), "steady": np.concatenate(steady)}


def by_noise(loaded: LoadedModel, window: WindowKV, tokens: list[int], seed: int) -> Arrays:
    """As `by_gradients`, with one value for all channels of a plane: 2·KL over the energy of the noise in it."""
    rng = np.random.default_rng(seed)
    following = tokens[WINDOW_TOKENS : WINDOW_TOKENS + LOSS_TOKENS]
    every_token = np.arange(window.tokens) >= SINK_POSITIONS
    with torch.no_grad():
        reference = loaded.log_probabilities(cache_of(window.float_pairs()), following)
        weights: dict[str, list[Float64s]] = {"every": [], "steady": []}
        for plane in range(len(window.planes)):
            values = window.unrotated(plane)
            amplitude = NOISE_AMPLITUDE * values[SINK_POSITIONS:].std(axis=0).mean()
            for name, noisy in (("every", every_token), ("steady", window.steady_tokens(plane // 2))):
                pairs = window.float_pairs()
                leaf = pairs[plane // 2][plane % 2]  # rotating white noise gives white noise: no need to un-rotate
                noise = rng.standard_normal(leaf.shape, np.float32) * amplitude * noisy[:, None]
                leaf += torch.from_numpy(noise)
                changed = loaded.log_probabilities(cache_of(pairs), following)
                energy = float((noise.astype(np.float64) ** 2).sum())
                weight = 2 * mean_kl(reference, changed) / energy if energy else 0.0
                weights[name].append(np.full(values.shape[1], max(weight, 0.0)))
    return {name: np.concatenate(planes) for name, planes in weights.items()}


def mean_kl(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Mean over tokens of KL(reference ‖ other) in nats, of log-probabilities [tokens, vocabulary]; float64 sums."""
    exact, changed = reference.double(), other.double()
    return float((exact.exp() * (exact - changed)).sum(-1).mean())


def channel_scales(measured: Sequence[Arrays], layout: KVLayout) -> list[Float64s]:
    """a of every plane's channels, a² being the weight of an error's square: √(w + 2 % of the plane's mean w), values
    divided by 0.8, with w the geometric mean of both kinds of W, each the mean of the windows'."""
    every, steady = (
        sum(np.asarray(window[name]) for window in measured) / len(measured) for name in ("every", "steady")
    )
    mixed = np.sqrt(every * steady)
    floor = max(float(mixed.mean()) * _WEIGHT_FLOOR, float(np.finfo(np.float32).tiny))
    scales, at = [], 0
    for plane in range(2 * layout.num_layers):
        own = mixed[at : at + plane_channels(layout, plane)]
        at += own.size
        smooth = own + REGULARISATION * own.mean() if own.size else own
        scales.append(np.sqrt(np.maximum(smooth, floor)) / (VALUE_SCALE if plane % 2 else 1.0))
    return scales

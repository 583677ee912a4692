"""Makes `kvstore_codec/tables.bin`, the probability tables that are part of the format (FORMAT.md §6).

Run by hand, once for each format version: the file is normative, this program only says where its numbers come
from. Needs scipy (`python codec/make_tables.py`). Sources: generalised Gaussian with shape 1.4, which codes real
KV within about 1 % of tables learned on it, and centroid reconstruction, as measured in the codec's study.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy.stats import gennorm, norm

SLOTS = 4096
SCALES = 48  # σ/step = 2^((index − 16)/4)
LIMIT = 127  # symbols −127…127, then escape
SHAPE = 1.4
EXPONENT_SYMBOLS = 64  # 62 distances below the base exponent, one unused, then escape
PHASES = 4  # of log2 σ within an octave
BIASES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 10.0, 20.0)  # |mean|/σ of a channel


def frequencies(p: np.ndarray) -> np.ndarray:
    """Integer frequencies that sum to SLOTS. Symbols under 0.35 slots get none and are escaped (last symbol)."""
    p = p / p.sum()
    keep = p * SLOTS >= 0.35
    keep[-1] = True
    freq = np.where(keep, np.maximum(1, np.round(p * SLOTS)), 0).astype(np.int64)
    freq[-1] = max(1, round(float((p[-1] + p[~keep].sum()) * SLOTS)))
    while freq.sum() != SLOTS:
        largest = int(freq.argmax())
        freq[largest] += int(np.clip(SLOTS - freq.sum(), -(freq[largest] // 2), freq[largest] // 2))
    return freq


def scale_tables() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """([48, 256] symbol frequencies, [48, 3, 3] refinement frequencies, [48, 4] fp16 shrinkage, in steps).

    Shrinkage moves a value of magnitude 1, 2, 3 or more to its bin's centroid; beyond 2 one number does for all, since
    the law's slope hardly changes (under 1e-4 of the quantiser's error)."""
    unit = 1 / np.sqrt(gennorm(SHAPE).var())
    symbols, digits, shrinkage = [], [], []
    for index in range(SCALES):
        law = gennorm(SHAPE, scale=unit * 2.0 ** ((index - 16) / 4))
        k = np.arange(1, LIMIT + 1)
        tail = law.sf(k - 0.5) - law.sf(k + 0.5)
        symbols.append(
            frequencies(np.concatenate([tail[::-1], [1 - 2 * law.sf(0.5)], tail, [2 * law.sf(LIMIT + 0.5)]]))
        )
        thirds = []
        for magnitude in range(3):
            edges = magnitude + np.array([-0.5, -1 / 6, 1 / 6, 0.5])
            # An escape value stands in for the last symbol's rule, which a digit does not have.
            p = np.maximum(
                law.cdf(edges[1:]) - law.cdf(edges[:-1]) if edges[0] < 0 else law.sf(edges[:-1]) - law.sf(edges[1:]),
                1e-300,
            )
            freq = np.maximum(1, np.round(p / p.sum() * SLOTS)).astype(np.int64)
            freq[int(freq.argmax())] += SLOTS - freq.sum()
            if magnitude == 0:  # exactly symmetric
                freq[0] = freq[2]
                freq[1] = SLOTS - 2 * freq[0]
            thirds.append(freq)
        digits.append(thirds)
        centroid = []
        for centre in k:
            x = np.linspace(centre - 0.5, centre + 0.5, 65)
            weight = np.exp(law.logpdf(x) - law.logpdf(centre - 0.5))
            centroid.append(float((x * weight).sum() / weight.sum()))
        outer = tail[2:] + 1e-300  # quiet scales have nothing there
        beyond = float(((k - np.array(centroid))[2:] * outer).sum() / outer.sum())
        shrinkage.append([0.0, 1 - centroid[0], 2 - centroid[1], beyond])
    return np.array(symbols), np.array(digits), np.array(shrinkage).astype(np.float16)


def exponent_tables() -> np.ndarray:
    """[40, 64] frequencies of (base exponent − exponent) of x ~ N(bias·σ, σ), for each bias and phase of log2 σ."""
    rows = []
    for bias in BIASES:
        for phase in range(PHASES):
            sigma = 2.0 ** (phase / PHASES)
            law = norm(bias * sigma, sigma)
            top = int(np.floor(np.log2((bias + 4.5) * sigma)))  # the base: hardly anything lies above
            low = 2.0 ** (top - np.arange(EXPONENT_SYMBOLS - 2, dtype=float))
            p = law.cdf(2 * low) - law.cdf(low) + law.cdf(-low) - law.cdf(-2 * low)
            above = law.sf(2 * low[0]) + law.cdf(-2 * low[0])
            rows.append(frequencies(np.concatenate([p, [0.0], [above + 2e-4]])))
    return np.array(rows)


def main() -> None:
    symbols, digits, shrinkage = scale_tables()
    exponents = exponent_tables()
    target = Path(__file__).parent / "kvstore_codec" / "tables.bin"
    target.write_bytes(
        symbols.astype("<u2").tobytes() + digits.astype("<u2").tobytes()
        + shrinkage.astype("<f2").tobytes() + exponents.astype("<u2").tobytes()
    )  # fmt: skip


if __name__ == "__main__":
    main()

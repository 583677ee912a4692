"""The NumPy coder behind the interface of `segments.SegmentCoder`."""

from __future__ import annotations

from kvstore_codec.reference import lossless, lossy


class ReferenceCoder:
    drain_tokens = staticmethod(lossy.drain_tokens)
    encode_lossy = staticmethod(lossy.encode_lossy)
    decode_lossy = staticmethod(lossy.decode_lossy)
    encode_lossless = staticmethod(lossless.encode_lossless)
    decode_lossless = staticmethod(lossless.decode_lossless)

"""The C++ coder behind the interface of `segments.SegmentCoder`."""

from __future__ import annotations

from kvstore_codec.reference.coder import ReferenceCoder as NativeCoder

__all__ = ["NativeCoder"]

"""Every implementation of the codec that this machine can run; all must agree to the bit."""

from __future__ import annotations

from kvstore_codec import _native
from kvstore_codec.native import NativeCoder
from kvstore_codec.reference.coder import ReferenceCoder
from kvstore_codec.segments import SegmentCoder

REFERENCE = ReferenceCoder()
#: by instruction set, from scalar to the best
NATIVE: dict[str, SegmentCoder] = {name: NativeCoder(name) for _, name in _native.instruction_sets()}
EVERY: dict[str, SegmentCoder] = {**NATIVE, "reference": REFERENCE}

"""Everything that can be wrong with a layout, an array or an object, as one tree.

    CodecError(ValueError)
    ├── LayoutError          a layout, token list or array does not fit what was asked: the caller's mistake
    ├── ValuesError          the values cannot be coded at this quality (NaN, infinities): use "lossless"
    ├── ProfileError         a profile's bytes or values are wrong, or it is not the one that is needed
    └── ObjectError          the bytes of an object are not what they should be
        ├── DamagedObject    checksum, length or structure is wrong: the bytes are damaged or hostile
        ├── UnsupportedObject  a later format version, an unknown codec
        ├── ProfileMissing   coded with a profile that was not given
        └── ForeignObject    intact, but of another namespace, chunk, part or shape than asked for

A store treats every ObjectError as a miss. `code` is stable and names the metric label; `context` holds
what was expected and what was found.
"""

from __future__ import annotations

from enum import Enum


class ErrorCode(str, Enum):
    LAYOUT = "layout"
    VALUES = "values"
    MAGIC_MISMATCH = "magic_mismatch"
    VERSION_UNSUPPORTED = "version_unsupported"
    CODEC_UNSUPPORTED = "codec_unsupported"
    TRUNCATED = "truncated"
    CHECKSUM_MISMATCH = "checksum_mismatch"
    STRUCTURE = "structure"
    IDENTITY_MISMATCH = "identity_mismatch"
    QUALITY_UNAVAILABLE = "quality_unavailable"
    PROFILE_MISSING = "profile_missing"


class CodecError(ValueError):
    """Root of this package's errors; `str()` is one line."""

    def __init__(self, message: str, *, code: ErrorCode, **context: object) -> None:
        super().__init__(message)
        self.code = code
        self.context = context

    def __str__(self) -> str:
        details = ", ".join(f"{key}={value}" for key, value in self.context.items())
        return f"{self.args[0]} ({details})" if details else str(self.args[0])


class LayoutError(CodecError):
    def __init__(self, message: str, **context: object) -> None:
        super().__init__(message, code=ErrorCode.LAYOUT, **context)


class ValuesError(CodecError):
    def __init__(self, message: str, **context: object) -> None:
        super().__init__(message, code=ErrorCode.VALUES, **context)


class ProfileError(CodecError):
    def __init__(self, message: str, *, code: ErrorCode = ErrorCode.STRUCTURE, **context: object) -> None:
        super().__init__(message, code=code, **context)


class ObjectError(CodecError):
    """The bytes cannot be read as the object asked for; a store counts it and reports a miss."""


class DamagedObject(ObjectError):
    pass


class UnsupportedObject(ObjectError):
    pass


class ProfileMissing(ObjectError):
    def __init__(self, message: str, **context: object) -> None:
        super().__init__(message, code=ErrorCode.PROFILE_MISSING, **context)


class ForeignObject(ObjectError):
    def __init__(self, message: str, **context: object) -> None:
        super().__init__(message, code=ErrorCode.IDENTITY_MISMATCH, **context)

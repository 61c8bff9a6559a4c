"""The codec's exceptions. Pure; imports nothing.

CodecError
+-- BlobError                what came from elsewhere cannot be decoded
|   +-- TruncatedBlob        fewer bytes than the header promises
|   +-- ChecksumMismatch     the bytes changed on the way
|   +-- WrongVersion         another format, or another version of it
|   +-- WrongProfile         coded with another profile
|   +-- BlobTooLarge         over a stated limit; nothing was allocated
|   +-- MalformedBlob        a valid checksum over contents that make no sense
+-- UnencodableTensor        the tensor cannot keep the level's promise (NaN, Inf, too large, wrong shape)
+-- UnknownLevel             the profile has no such level
+-- InvalidProfile           the profile file is damaged or not a profile
+-- WrongRefinement          a refinement was made from another encoding than the blob it was put behind
+-- RopeRequired             the level codes keys before RoPE and no matching RopeTable was given
"""

from __future__ import annotations


class CodecError(Exception):
    """Base of everything the codec raises on purpose."""


class BlobError(CodecError):
    """A blob from elsewhere cannot be decoded."""


class TruncatedBlob(BlobError):
    """Fewer bytes than the header promises."""


class ChecksumMismatch(BlobError):
    """The checksum does not fit the bytes."""


class WrongVersion(BlobError):
    """Not this format, or not this version of it."""


class WrongProfile(BlobError):
    """The blob was coded with another profile or for another layout."""


class BlobTooLarge(BlobError):
    """Over a stated limit."""


class MalformedBlob(BlobError):
    """The checksum holds and the contents make no sense."""


class UnencodableTensor(CodecError):
    """The tensor cannot be coded at this level within its promise."""


class UnknownLevel(CodecError):
    """The profile has no level of that name."""


class InvalidProfile(CodecError):
    """A profile file that is damaged, of another version, or contradicts itself."""


class WrongRefinement(CodecError):
    """A refinement of another encoding, chunk or part than the blob that it was put behind."""


class RopeRequired(CodecError):
    """Keys are coded before RoPE at this level, and no matching RopeTable was given."""

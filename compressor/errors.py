"""Every error the compressor raises on purpose.

    ImpartError
    ├── InputError              what the user gave cannot be used; the message names the remedy
    │   ├── CheckpointError     not a readable safetensors checkpoint
    │   ├── UnsupportedTensor   a tensor or architecture no codec can encode; names the tensor
    │   └── BudgetError         the ratio asked for cannot be met; says what can
    ├── OutputError             the output exists, is locked by another run, or cannot be written
    └── ArtifactError           a delta artifact that must not be used
        ├── NotADelta           not an artifact directory at all
        ├── Unreadable          the system did not let us read it: says nothing of its bytes
        ├── Corrupt             bytes differ from the manifest, or do not parse
        ├── WrongBase           made for another base model
        ├── WrongShape          a tensor's shape, dtype or index range contradicts the config
        ├── NonFinite           NaN or infinity among scales or values
        ├── TooLarge            a declared size beyond the limits of this reader
        └── UnsupportedVersion  a format version or codec this reader does not know

The command line exits with 2 on any of them.
"""

from __future__ import annotations


class ImpartError(Exception):
    """Root of the tree."""


class InputError(ImpartError):
    """What the user gave cannot be used."""


class CheckpointError(InputError):
    """Not a readable safetensors checkpoint."""


class UnsupportedTensor(InputError):
    """A tensor or architecture that no codec can encode."""


class BudgetError(InputError):
    """The size asked for cannot be met."""


class OutputError(ImpartError):
    """The output exists, is locked by another run, or cannot be written."""


class ArtifactError(ImpartError):
    """A delta artifact that must not be used."""


class NotADelta(ArtifactError):
    """Not an artifact directory."""


class Unreadable(ArtifactError):
    """The system did not let us open or read it; its bytes may be whole."""


class Corrupt(ArtifactError):
    """Bytes differ from the manifest, or do not parse."""


class WrongBase(ArtifactError):
    """Made for another base model."""


class WrongShape(ArtifactError):
    """A tensor's shape, dtype or index range contradicts the config."""


class NonFinite(ArtifactError):
    """NaN or infinity among scales or values."""


class TooLarge(ArtifactError):
    """A declared size beyond the limits of this reader."""


class UnsupportedVersion(ArtifactError):
    """A format version or codec this reader does not know."""

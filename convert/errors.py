"""The error of this package: everything that is wrong with a checkpoint, at once."""

from collections.abc import Sequence

from jaxvqa.errors import JaxVQAError


class ConversionError(JaxVQAError):
    """A checkpoint that cannot be read as it stands; `faults` lists what is wrong with it, one line each."""

    def __init__(self, what: str, faults: Sequence[str] = (), remedy: str = ""):
        self.faults = tuple(faults)
        super().__init__("\n  ".join([what, *self.faults]) + ("\n" if faults else "; ") * bool(remedy) + remedy)

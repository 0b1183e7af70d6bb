"""What commands print: aligned tables, marks that survive a terminal without Unicode, errors as text."""

import sys
from collections.abc import Sequence
from itertools import zip_longest

from jaxvqa.errors import JaxVQAError

# Paths that the user gave; any other OSError (a full disk) is a failure of the work, not of the request.
WRONG_PATH = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Rows under a header, left-aligned in columns as wide as their longest line; a cell may have several lines."""
    cells = [[str(cell).split("\n") for cell in row] for row in (header, *rows)]
    widths = [max(len(line) for cell in column for line in cell) for column in zip(*cells, strict=True)]
    cells.insert(1, [["-" * width] for width in widths])
    lines = [line for row in cells for line in zip_longest(*row, fillvalue="")]
    padded = [[text.ljust(width) for text, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in padded)


def shortened(text: str, longest: int = 32) -> str:
    """A text as one line of a table: whitespace folded, its end cut off where it is too long."""
    text = " ".join(text.split())
    return text if len(text) <= longest else text[: longest - 3] + "..."


def mark(right: bool | None) -> str:
    """✓ right, ✗ wrong, nothing where it is unknown; plain letters where stdout cannot show them."""
    if right is None:
        return ""
    plain = "✓".encode(sys.stdout.encoding or "ascii", "ignore") == b""
    return ("+" if plain else "✓") if right else ("-" if plain else "✗")


def box_text(box: Sequence[float]) -> str:
    """A box xyxy as whole pixels: `(688, 432, 1024, 768)`."""
    return f"({', '.join(str(round(float(edge))) for edge in box)})"


def progress(message: str) -> None:
    """Say what is happening, on stderr: stdout belongs to the result."""
    print(message, file=sys.stderr, flush=True)


def error_text(error: Exception) -> str:
    """An error for a user. Ours are written for one; a foreign one is folded to a line and named by its type."""
    if isinstance(error, JaxVQAError):
        return str(error)
    if isinstance(error, WRONG_PATH) and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"

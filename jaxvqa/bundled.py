"""Where the bundled models lie."""

from pathlib import Path

SPECKS_LLAVA = Path(__file__).parent / "assets" / "specks-llava"
"""LLaVA trained on Specks: an ordinary Hugging Face folder."""

"""Where the bundled models lie."""

from pathlib import Path

SPECKS_LLAVA = Path(__file__).parent / "assets" / "specks-llava"
"""LLaVA trained on Specks: an ordinary Hugging Face folder."""

SPECKS_BLIP = Path(__file__).parent / "assets" / "specks-blip"
"""BLIP image-text matching trained on Specks: an ordinary Hugging Face folder."""

"""Where the bundled models lie."""

from pathlib import Path

SPECKS_LLAVA = Path(__file__).parent / "assets" / "specks-llava"
"""LLaVA trained on Specks: an ordinary Hugging Face folder."""

SPECKS_LLAVA_NEXT = Path(__file__).parent / "assets" / "specks-llava-next"
"""LLaVA-NeXT, which sees an image whole and in 2 x 2 tiles, trained on Specks: an ordinary Hugging Face folder."""

VLMS = SPECKS_LLAVA, SPECKS_LLAVA_NEXT

SPECKS_BLIP = Path(__file__).parent / "assets" / "specks-blip"
"""BLIP image-text matching trained on Specks: an ordinary Hugging Face folder."""

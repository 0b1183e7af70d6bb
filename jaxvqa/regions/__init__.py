"""From heat maps to boxes in pixels of the original image."""

from jaxvqa.regions.windows import RATIOS, Found, Tiles, Windows, find, high_res_split, plan, search

__all__ = ["RATIOS", "Found", "Tiles", "Windows", "find", "high_res_split", "plan", "search"]

"""Which module knows a family's checkpoints.

Each has names (`TABLE`, `HF`, `EXPORT`, `FUSED`, `unread`), the parameters' `specs`, and `exported` for the way back.
"""

from types import ModuleType

from jaxvqa.convert import blip_itm, llava
from jaxvqa.models.blip_itm import BlipItm, BlipItmConfig
from jaxvqa.models.llava import Llava, LlavaConfig

Config = LlavaConfig | BlipItmConfig
Params = Llava | BlipItm

ARCHITECTURES = (*llava.ARCHITECTURES, *blip_itm.ARCHITECTURES)
"""What can be read, as config.json names it."""


def tables_of(config: Config) -> ModuleType:
    """The names and transforms of the checkpoints of `config`'s family."""
    return {LlavaConfig: llava, BlipItmConfig: blip_itm}[type(config)]

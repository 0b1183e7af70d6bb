"""Which module knows a family's checkpoints.

Each has names (`TABLE`, `HF`, `EXPORT`, `FUSED`), the parameters' `specs`, and `to_hf` for the way back.
"""

from types import ModuleType

from jaxvqa.convert import blip_itm, instructblip, internvl, llava, llava_onevision, qwen2_5_vl, qwen3_vl
from jaxvqa.models.blip_itm import BlipItm, BlipItmConfig
from jaxvqa.models.instructblip import InstructBlip, InstructBlipConfig
from jaxvqa.models.internvl import InternVL, InternVLConfig
from jaxvqa.models.llava import Llava, LlavaConfig
from jaxvqa.models.llava_next import LlavaNextConfig
from jaxvqa.models.llava_onevision import LlavaOnevision, LlavaOnevisionConfig
from jaxvqa.models.qwen2_5_vl import QwenVL, QwenVLConfig
from jaxvqa.models.qwen3_vl import Qwen3VL, Qwen3VLConfig

Config = (
    LlavaConfig
    | BlipItmConfig
    | LlavaOnevisionConfig
    | QwenVLConfig
    | Qwen3VLConfig
    | InternVLConfig
    | InstructBlipConfig
)
Params = Llava | BlipItm | LlavaOnevision | QwenVL | Qwen3VL | InternVL | InstructBlip

ARCHITECTURES = (
    *llava.ARCHITECTURES,
    *blip_itm.ARCHITECTURES,
    *llava_onevision.ARCHITECTURES,
    *qwen2_5_vl.ARCHITECTURES,
    *qwen3_vl.ARCHITECTURES,
    *internvl.ARCHITECTURES,
    *instructblip.ARCHITECTURES,
)
"""What can be read, as config.json names it."""


def tables_of(config: Config) -> ModuleType:
    """The names and transforms of the checkpoints of `config`'s family."""
    return {
        LlavaConfig: llava,
        BlipItmConfig: blip_itm,
        LlavaOnevisionConfig: llava_onevision,
        LlavaNextConfig: llava_onevision,
        QwenVLConfig: qwen2_5_vl,
        Qwen3VLConfig: qwen3_vl,
        InternVLConfig: internvl,
        InstructBlipConfig: instructblip,
    }[type(config)]

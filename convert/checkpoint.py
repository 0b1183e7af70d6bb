"""A checkpoint opened for reading: its configuration, and its tensors under the table's names."""

import os
import shlex
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jaxvqa.convert import adapters, internvl, llava
from jaxvqa.convert.errors import ConversionError
from jaxvqa.convert.families import ARCHITECTURES, Config, tables_of
from jaxvqa.convert.source import resolve
from jaxvqa.convert.tables import Fused, Naming, read_params, split_fused
from jaxvqa.convert.tables import plan as plan_leaves
from jaxvqa.convert.tensors import FLOATS, Tensor, folder_tensors
from jaxvqa.models import FAMILIES, config_from_hf
from jaxvqa.models.llava import LlavaConfig


@dataclass(frozen=True)
class Checkpoint:
    """`tensors` are (name in the table, tensor); `faults` is what opening them has shown to be wrong.

    `processor()` gives the folder from which transformers loads the processor.
    """

    folder: Path
    hf_config: dict[str, Any]
    config: Config
    tensors: list[tuple[str, Tensor]]
    faults: list[str]
    processor: Callable[[], Path]

    def read(self, dtype: np.dtype | None = None, shardings: Any = None) -> Any:
        """The parameters; raises `ConversionError` with every tensor that is unknown, missing, duplicate or misshapen.

        These show in the headers, before any weight is read; NaN and infinite values are then found while reading.
        """
        tables = tables_of(self.config)
        specs = tables.specs(self.config)
        planned, faults = plan_leaves(self.tensors, tables.TABLE, specs)
        if faults := [*self.faults, *faults]:
            raise ConversionError(
                f"{self.folder}: the weights do not fit its config.json, {len(faults)} faults",
                faults,
                remedy="fetch the checkpoint again, or correct config.json if it belongs to other weights",
            )
        return read_params(planned, specs, dtype, shardings)


def open_checkpoint(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    offline: bool = False,
    from_pickle: bool = False,
    vision_tower: str | os.PathLike[str] | None = None,
    base: str | os.PathLike[str] | None = None,
    command: str | None = None,
) -> Checkpoint:
    """Open an HF folder or hub id, an original LLaVA folder with its vision tower, or a LoRA adapter with its base.

    For the arguments see `load` and `convert`. command: what a refusal of pickled weights names; by default the
    conversion of this source with these arguments.
    """
    command = command or _pickle_command(source, revision, vision_tower, base)
    folder = resolve(source, revision, offline, from_pickle, command)
    if (folder / "adapter_config.json").exists():
        options = adapters.read_options(folder)
        below = base or options.base
        if below is None:
            raise ConversionError(
                f"{folder}: an adapter whose config names no base model", remedy="name it with `base`"
            )
        opened = open_checkpoint(
            below, offline=offline, from_pickle=from_pickle, vision_tower=vision_tower, command=command
        )
        naming = llava.ORIGINAL if llava.is_original(llava.read_config(opened.folder)) else tables_of(opened.config).HF
        tensors, faults = adapters.merge(folder, options, naming, opened.tensors, from_pickle, command)
        return Checkpoint(folder, opened.hf_config, opened.config, tensors, [*opened.faults, *faults], opened.processor)
    if base is not None:
        raise ConversionError(f"{folder}: `base` is given, but this is no adapter (no adapter_config.json)")

    hf = llava.read_config(folder)
    _check_supported(folder, hf)
    if internvl.is_original(hf):
        assembled = internvl.assemble(hf, folder)
        raw, faults = folder_tensors(folder, from_pickle, command)
        processor = partial(_internvl_processor, folder, hf)
        return _opened(folder, assembled, internvl.original_tensors(raw), faults, processor)
    if not llava.is_original(hf):
        if vision_tower is not None:
            raise ConversionError(f"{folder}: `vision_tower` is given, but this checkpoint holds its own")
        tables = tables_of(config_from_hf(hf))
        raw, faults = folder_tensors(folder, from_pickle, command)
        return _opened(folder, hf, _named(raw, tables.HF, tables.FUSED), faults, lambda: folder)

    tower = resolve(vision_tower or hf["mm_vision_tower"], None, offline, from_pickle, command)
    hf = llava.assemble(hf, tower)
    config = LlavaConfig.from_hf(hf)
    raw, faults = folder_tensors(folder, from_pickle, command)
    tensors = _named(raw, llava.ORIGINAL)
    if not any(name.startswith("vision_tower.") for name, _ in tensors):
        raw, more = folder_tensors(tower, from_pickle, command)
        tensors, faults = tensors + _named(raw, llava.CLIP), faults + more
    return _opened(folder, hf, tensors, faults, lambda: _original_processor(folder, tower, config))


def _opened(
    folder: Path,
    hf: dict[str, Any],
    tensors: list[tuple[str, Tensor]],
    faults: list[str],
    processor: Callable[[], Path],
) -> Checkpoint:
    """A checkpoint, with what it stores beside a config that ties the output head to the embedding.

    A stored head that equals the embedding is dropped. One that does not is used and the config taken to be wrong, as
    transformers 5 does: what is stored has been trained.
    """
    config = config_from_hf(hf)
    names = {path: name for name, (path, _) in tables_of(config).TABLE.items()}
    stored = dict(tensors)
    head, embed = (stored.get(names.get(f"decoder.{leaf}", "")) for leaf in ("lm_head", "embed"))
    if head is not None and embed is not None and config.decoder.tied:
        if _equal(head, embed):
            tensors = [(name, tensor) for name, tensor in tensors if name != names["decoder.lm_head"]]
        else:
            no = {"tie_word_embeddings": False}
            hf = hf | no | ({"text_config": hf["text_config"] | no} if "text_config" in hf else {})
            config = config_from_hf(hf)
    return Checkpoint(folder, hf, config, tensors, faults, processor)


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two matrices hold the same values; read by parts of 2²⁴ of them."""
    if a.shape != b.shape or len(a.shape) != 2 or not {a.dtype, b.dtype} <= FLOATS.keys():
        return False
    (rows, columns), step = a.shape, max(1, 2**24 // max(1, a.shape[1]))
    parts = ((slice(i, min(i + step, rows)), slice(0, columns)) for i in range(0, rows, step))
    return all(np.array_equal(a.read(part), b.read(part)) for part in parts)


def _pickle_command(source, revision, vision_tower, base) -> str:
    options = {"--revision": revision, "--vision-tower": vision_tower, "--base": base}
    given = [word for name, value in options.items() if value is not None for word in (name, os.fspath(value))]
    return shlex.join(["jaxvqa", "convert", "--from-pickle", *given, os.fspath(source), "OUT"])


def _named(raw: list[Tensor], naming: Naming, fused: Fused | None = None) -> list[tuple[str, Tensor]]:
    named = [(name, tensor) for tensor in raw if (name := naming.canonical(tensor.name)) is not None]
    return split_fused(named, fused or {})


def _check_supported(folder: Path, hf: dict[str, Any]) -> None:
    found = hf.get("architectures") or [f"model_type {hf.get('model_type')!r}"]
    known = any(a in ARCHITECTURES for a in found) or (not hf.get("architectures") and hf.get("model_type") in FAMILIES)
    if not known:
        raise ConversionError(
            f"{folder}/config.json: architecture {', '.join(map(str, found))} is not supported;"
            f" supported: {', '.join(ARCHITECTURES)}"
        )
    if method := hf.get("quantization_config") or hf.get("text_config", {}).get("quantization_config"):
        kind = method.get("quant_method", "unknown") if isinstance(method, dict) else method
        raise ConversionError(
            f"{folder}/config.json: a quantised checkpoint ({kind}); expected bf16, f16 or f32 weights",
            remedy="load the checkpoint that it was made from",
        )


_TEMPORARY: list[tempfile.TemporaryDirectory[str]] = []  # processors made up below live as long as the process


def _internvl_processor(folder: Path, hf: dict[str, Any]) -> Path:
    """The processor of transformers' InternVL for an original folder, whose code cuts the tiles."""
    out = tempfile.TemporaryDirectory(prefix="jaxvqa-processor-")
    _TEMPORARY.append(out)
    internvl.write_processor(folder, hf, Path(out.name))
    return Path(out.name)


def _original_processor(folder: Path, tower: Path, config: LlavaConfig) -> Path:
    """The processor of transformers' LLaVA for an original folder, which has only a tokenizer."""
    from transformers import AutoTokenizer, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (ImportError, OSError, ValueError) as e:
        reason = str(e).strip().splitlines()[0]
        raise ConversionError(f"{folder}: cannot load the tokenizer ({reason}); expected tokenizer.json") from e
    tokenizer.add_tokens("<image>", special_tokens=True)
    if (found := tokenizer.convert_tokens_to_ids("<image>")) != config.image_token_id:
        raise ConversionError(
            f"{folder}: the tokenizer has {found} tokens before <image>, expected {config.image_token_id} (vocab_size)"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    out = tempfile.TemporaryDirectory(prefix="jaxvqa-processor-")
    _TEMPORARY.append(out)
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil.from_pretrained(tower, local_files_only=True),
        tokenizer=tokenizer,
        patch_size=config.vision.patch_size,
        vision_feature_select_strategy=config.select,
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(out.name)
    processor.image_processor.save_pretrained(out.name)
    if (folder / "generation_config.json").exists():
        shutil.copy(folder / "generation_config.json", out.name)
    return Path(out.name)

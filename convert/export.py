"""Parameters back to a Hugging Face folder, by the inverse of the tables."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from jaxvqa.convert.errors import ConversionError
from jaxvqa.convert.families import Config, Params, tables_of
from jaxvqa.convert.files import copy_processor, publish, write_json
from jaxvqa.convert.tables import flatten, join_fused, leaves
from jaxvqa.models.blip_itm import BlipItmConfig

SHARD_BYTES = 5_000_000_000  # as transformers' max_shard_size


def export_hf(
    config: Config,
    params: Params,
    out: str | os.PathLike[str],
    *,
    processor_folder: str | os.PathLike[str],
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write config.json, safetensors and processor to the folder `out`, for transformers and `load`; returns `out`.

    Values and dtypes are kept. Names are those that transformers 5 saves by default.
    """
    arrays, tables = flatten(params), tables_of(config)
    if wrong := [
        f"{path}: found {list(arrays[path].shape) if path in arrays else 'none'}, expected {list(spec.shape)}"
        for path, spec in leaves(tables.specs(config)).items()
        if path not in arrays or arrays[path].shape != spec.shape
    ]:
        raise ConversionError("the parameters do not fit the config", wrong)
    hf, arrays = _stored(config, {path: np.asarray(array) for path, array in arrays.items()})
    tensors = {}
    for pattern, (path, transform) in tables.TABLE.items():
        if path not in arrays:
            continue
        name = pattern
        for ours, theirs in tables.EXPORT.items():
            name = theirs + name.removeprefix(ours) if name.startswith(ours) else name
        if "{i}" in name:
            tensors |= {name.replace("{i}", str(i)): transform.inverse(layer) for i, layer in enumerate(arrays[path])}
        else:
            tensors[name] = transform.inverse(arrays[path])
    tensors = join_fused(tensors, tables.FUSED)

    with publish(out, overwrite) as folder:
        _write_weights(folder, {name: np.ascontiguousarray(t) for name, t in tensors.items()}, shard_bytes)
        copy_processor(Path(processor_folder), folder)
        write_json(folder / "config.json", hf)
    return Path(out)


def _stored(config: Config, arrays: dict[str, np.ndarray]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The HF config.json, and the parameters by path as they are stored.

    Where the image token has no row in the embedding (checkpoints of the original LLaVA), rows are appended, as
    transformers looks them up: the mean row, whose logit is the mean of all logits and so never the largest.
    """
    hf = tables_of(config).to_hf(config)
    if (back := type(config).from_hf(hf)) != config:
        raise ConversionError(f"this config has no HF form: it reads back as {back}, expected {config}")
    if isinstance(config, BlipItmConfig):
        return hf | {"dtype": str(arrays["text.embed"].dtype)}, arrays
    rows = max(config.decoder.vocab_size, config.image_token_id + 1)
    hf["text_config"]["vocab_size"] = rows
    axes = {"decoder.embed": 0, "decoder.lm_head": 1}
    longer = {path: _with_rows(arrays[path], rows, axis) for path, axis in axes.items() if path in arrays}
    return hf | {"dtype": str(arrays["decoder.embed"].dtype)}, arrays | longer


def _with_rows(array: np.ndarray, rows: int, axis: int) -> np.ndarray:
    missing = rows - array.shape[axis]
    if missing <= 0:
        return array
    mean = array.astype(np.float32).mean(axis=axis, keepdims=True).astype(array.dtype)
    return np.concatenate([array, np.repeat(mean, missing, axis=axis)], axis=axis)


def _write_weights(folder: Path, tensors: dict[str, np.ndarray], shard_bytes: int) -> None:
    shards: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(t.nbytes for t in tensors.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})

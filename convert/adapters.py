"""LoRA adapters in PEFT's form: merged into the base weights while these are read."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxvqa.convert.errors import ConversionError
from jaxvqa.convert.tables import Naming
from jaxvqa.convert.tensors import FLOATS, Tensor, read_json, refused_pickle, safe_tensors


@dataclass(frozen=True)
class Options:
    """What adapter_config.json says; `rank_pattern` and `alpha_pattern` override by module name."""

    base: str | None
    rank: int
    alpha: float
    rslora: bool
    transposed: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]

    def scale(self, module: str, rank: int) -> float:
        """PEFT's factor of B·A for a module: alpha / r, or alpha / sqrt(r) with rsLoRA."""
        alpha = _by_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / (rank**0.5 if self.rslora else rank)

    def expected_rank(self, module: str) -> int:
        return int(_by_pattern(self.rank_pattern, module, self.rank))


@dataclass(frozen=True)
class Merged:
    """W + scale · B·A, a slice at a time, in f32. A [r, in], B [out, r], both small and held in memory."""

    base: Tensor
    a: np.ndarray
    b: np.ndarray
    scale: float
    transposed: bool  # W is stored [in, out]

    name = property(lambda self: self.base.name)
    file = property(lambda self: self.base.file)
    shape = property(lambda self: self.base.shape)
    dtype = property(lambda self: self.base.dtype)

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        rows, columns = reversed(index) if self.transposed else index
        delta = self.scale * (self.b[rows] @ self.a[:, columns])
        return self.base.read(index).astype(np.float32) + (delta.T if self.transposed else delta)


def read_options(folder: Path) -> Options:
    """adapter_config.json; kinds of adapter that are more than W + scale · B·A are refused."""
    path = folder / "adapter_config.json"
    cfg = read_json(path)
    faults = []
    if (kind := cfg.get("peft_type")) != "LORA":
        faults.append(f"peft_type {kind!r}, expected 'LORA'")
    for key in (
        "use_dora",
        "lora_bias",
        "use_qalora",
        "trainable_token_indices",
        "layer_replication",
        "alora_invocation_tokens",
    ):
        if cfg.get(key):
            faults.append(f"{key} {cfg[key]!r}, expected none")
    if (bias := cfg.get("bias", "none")) != "none":
        faults.append(f"bias {bias!r}, expected 'none'")
    # Other initialisations (PiSSA, OLoRA, LoftQ, CorDA) also change the base weights.
    if isinstance(init := cfg.get("init_lora_weights", True), str) and init not in ("gaussian", "eva", "orthogonal"):
        faults.append(
            f"init_lora_weights {init!r} changes the base weights; expected an adapter converted to plain LoRA"
        )
    if not isinstance(cfg.get("r"), int) or cfg["r"] < 1:
        faults.append(f"r {cfg.get('r')!r}, expected a positive integer")
    if not isinstance(cfg.get("lora_alpha"), int | float):
        faults.append(f"lora_alpha {cfg.get('lora_alpha')!r}, expected a number")
    if faults:
        raise ConversionError(
            f"{path}: this adapter cannot be merged", faults, remedy="merge it with PEFT and load the result"
        )
    return Options(
        base=cfg.get("base_model_name_or_path"),
        rank=cfg["r"],
        alpha=cfg["lora_alpha"],
        rslora=bool(cfg.get("use_rslora")),
        transposed=bool(cfg.get("fan_in_fan_out")),
        rank_pattern=cfg.get("rank_pattern") or {},
        alpha_pattern=cfg.get("alpha_pattern") or {},
    )


def merge(
    folder: Path, options: Options, naming: Naming, base: list[tuple[str, Tensor]], from_pickle: bool, command: str
) -> tuple[list[tuple[str, Tensor]], list[str]]:
    """The base's tensors with the adapter's folded in: (tensors, faults).

    Low-rank pairs are added; whole tensors (PEFT's modules_to_save, LLaVA's non_lora_trainables) replace.
    """
    pairs: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    faults = []
    for tensor in _adapter_tensors(folder, from_pickle, command):
        name = tensor.name.removeprefix("base_model.model.").replace(".modules_to_save.", ".").replace(".default.", ".")
        if (m := re.fullmatch(r"(.+)\.lora_([AB])\.weight", name)) is not None:
            module = naming.canonical(m[1] + ".weight") or m[1]
            if m[2] in pairs.setdefault(module, {}):
                faults.append(f"duplicate: {tensor.name}: found twice for {module}, expected once")
            pairs[module][m[2]] = tensor
        elif (canonical := naming.canonical(name)) is not None:
            if canonical in whole:
                faults.append(f"duplicate: {tensor.name}: found twice for {canonical}, expected once")
            whole[canonical] = tensor

    known = dict(base)
    for name, tensor in whole.items():
        if name not in known:
            faults.append(
                f"unknown: {tensor.name}: found {list(tensor.shape)} in {tensor.file}, expected no such tensor"
            )
    merged: dict[str, Tensor] = {}
    for name, pair in pairs.items():
        if missing := {"A", "B"} - pair.keys():
            faults.append(f"missing: lora_{missing.pop()} of {name}: found its partner only, expected both")
        elif name not in known:
            faults.append(f"unknown: {pair['A'].name}: the base model has no {name}")
        elif fault := _misfit(name, pair, known[name], options):
            faults.append(fault)
        else:
            module = pair["A"].name.removeprefix("base_model.model.").split(".lora_A")[0]
            a, b = (_whole(pair[k]) for k in "AB")
            merged[name] = Merged(known[name], a, b, options.scale(module, a.shape[0]), options.transposed)
            for k, values in (("A", a), ("B", b)):
                if not np.isfinite(values).all():
                    faults.append(f"not finite: {pair[k].name}: found NaN or infinite values, expected finite weights")
    if not pairs and not faults:
        faults.append(f"missing: {folder}: found no lora_A and lora_B tensors")
    return [(name, whole.get(name) or merged.get(name) or tensor) for name, tensor in base], faults


def _adapter_tensors(folder: Path, from_pickle: bool, command: str) -> list[Tensor]:
    tensors: list[Tensor] = []
    # LLaVA's own training script saves what it trains beside LoRA (the projector) in a pickle of its own.
    for stem in ("adapter_model", "non_lora_trainables"):
        if (folder / f"{stem}.safetensors").exists():
            tensors += safe_tensors(folder / f"{stem}.safetensors")
        elif (path := folder / f"{stem}.bin").exists():
            if not from_pickle:
                raise refused_pickle(folder, [path.name], command)
            from jaxvqa.convert.pickled import pickled_tensors

            tensors += pickled_tensors(path)
        elif stem == "adapter_model":
            raise ConversionError(f"{folder}: no adapter_model.safetensors beside adapter_config.json")
    return tensors


def _misfit(name: str, pair: dict[str, Tensor], base: Tensor, options: Options) -> str | None:
    a, b = pair["A"], pair["B"]
    module = a.name.removeprefix("base_model.model.").split(".lora_A")[0]
    rank = options.expected_rank(module)
    if len(base.shape) != 2:
        return f"misshapen: {name} has {len(base.shape)} axes, expected a matrix for LoRA"
    out, into = reversed(base.shape) if options.transposed else base.shape
    for tensor, shape in ((a, (rank, into)), (b, (out, rank))):
        if tensor.shape != shape:
            return f"misshapen: {tensor.name}: found {list(tensor.shape)}, expected {list(shape)}"
        if tensor.dtype not in FLOATS:
            return f"dtype: {tensor.name}: found {tensor.dtype}, expected {', '.join(FLOATS)}"
    return None


def _whole(tensor: Tensor) -> np.ndarray:
    return tensor.read(tuple(slice(0, n) for n in tensor.shape)).astype(np.float32)


def _by_pattern(patterns: dict[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the module's name."""
    return next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", module)), default)

"""List the model families that load, the models of the papers, and which methods work with them.

Nothing is downloaded: every method is asked whether it binds to the configurations of the published models.

Example: jaxvqa models
"""

import argparse
import dataclasses
import inspect
import json
import tempfile
import typing
from collections.abc import Iterator
from pathlib import Path

from jaxvqa.bundled import SPECKS_LLAVA, VLMS
from jaxvqa.cli.output import mark, table

if typing.TYPE_CHECKING:
    from jaxvqa.vlm import VLM

CONFIGS = SPECKS_LLAVA.parent / "published"
"""Of each model below NAME.json: `config` and `preprocessor`, the JSON files of its repository."""

PUBLISHED = {
    "llava-1.5-7b": ("llava-hf/llava-1.5-7b-hf", ("ViCrop", "HiPerson", "FOCUS", "CoF", "VIF")),
    "llava-1.5-13b": ("llava-hf/llava-1.5-13b-hf", ("CoF",)),
    "llava-next-vicuna-7b": ("llava-hf/llava-v1.6-vicuna-7b-hf", ()),
    "llava-onevision-qwen2-7b": ("llava-hf/llava-onevision-qwen2-7b-ov-hf", ("FOCUS",)),
    "qwen2-vl-7b": ("Qwen/Qwen2-VL-7B-Instruct", ()),
    "qwen2.5-vl-3b": ("Qwen/Qwen2.5-VL-3B-Instruct", ("ViCrop",)),
    "qwen2.5-vl-7b": ("Qwen/Qwen2.5-VL-7B-Instruct", ("FOCUS", "VIF")),
    "qwen3-vl-8b": ("Qwen/Qwen3-VL-8B-Instruct", ("HiPerson",)),
    "internvl3.5-8b": ("OpenGVLab/InternVL3_5-8B-HF", ("HiPerson",)),
    "instructblip-vicuna-7b": ("Salesforce/instructblip-vicuna-7b", ("ViCrop", "HiPerson")),
    "instructblip-vicuna-13b": ("Salesforce/instructblip-vicuna-13b", ("CoF",)),
}
"""Name -> (hub id, papers that report on it)."""


class Verdict(typing.NamedTuple):
    """What a method says when it is asked to work with a model."""

    works: bool
    reason: str
    """Why not; or, where it works, what it must be given first; empty where there is nothing to say."""
    options: dict[str, typing.Any]
    """Its options on this model, where they are not the defaults."""


class Model(typing.NamedTuple):
    """One published model."""

    kind: str
    """HF's model_type."""
    name: str
    papers: tuple[str, ...]
    verdicts: dict[str, Verdict]
    """By method; and by method and option ("vicrop maps=pure_grad") where a choice decides whether it works."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="for programs, with each method's options on each model")


def run(args: argparse.Namespace) -> int:
    from jaxvqa.convert.checkpoint import ARCHITECTURES
    from jaxvqa.models import FAMILIES

    about = {kind: inspect.getdoc(inspect.getmodule(config)) or "" for kind, config in FAMILIES.items()}
    about, models = {kind: doc.partition("\n")[0] for kind, doc in about.items()}, matrix()
    if args.json:
        print(json.dumps({kind: as_json(kind, what, models) for kind, what in about.items()}, indent=1))
        return 0
    print(table(("model_type", "what it is"), list(about.items())))
    print(f"\narchitectures in config.json: {', '.join(ARCHITECTURES)}\n")
    print(table(("model", "model_type", "in the papers of"), [(m.name, m.kind, ", ".join(m.papers)) for m in models]))
    print(f"\n{grid(models)}\n")
    for folder in VLMS:
        file, note = folder / "model.safetensors", ", the default of --model" if folder == SPECKS_LLAVA else ""
        size = f"{file.stat().st_size / 1e6:.1f} MB" if file.exists() else "its weights are missing: reinstall jaxvqa"
        print(f"bundled model{note}: {folder} ({size})")
    return 0


def grid(models: list[Model]) -> str:
    """Methods by families: whether each works, and under the table the reasons."""
    kinds, notes, rows = list(dict.fromkeys(model.kind for model in models)), {}, []
    for name in models[0].verdicts:
        cells = []
        for kind in kinds:
            found = [model.verdicts[name] for model in models if model.kind == kind]
            worst = min(found, key=lambda verdict: verdict.works)
            note = f" {notes.setdefault(worst.reason, len(notes) + 1)}" if worst.reason else ""
            cells.append(mark(worst.works) + note)
        rows.append((name, *cells))
    said = "\n".join(f"{number}: {reason}" for reason, number in notes.items())
    return f"{table(('method', *kinds), rows)}\n\n{said}"


def as_json(kind: str, about: str, models: list[Model]) -> dict[str, typing.Any]:
    found = [model._asdict() for model in models if model.kind == kind]
    for model in found:
        model["verdicts"] = {name: verdict._asdict() for name, verdict in model["verdicts"].items()}
    return {"about": about, "models": found}


def matrix() -> list[Model]:
    """Every published model, and what the methods say of it."""
    from jaxvqa import methods

    vlms = {name: abstract(name) for name in PUBLISHED}
    asked = {}
    for method in methods.names():
        of = {name: ask(method, vlm) for name, vlm in vlms.items()}
        asked[method] = of
        for option, value in choices(methods.get(method)):
            chosen = {name: ask(method, vlm, **{option: value}) for name, vlm in vlms.items()}
            worse = [name for name in vlms if of[name].works > chosen[name].works]
            if 0 < len(worse) < len(vlms):
                asked[f"{method} {option}={value}"] = chosen
    return [
        Model(read(name)["config"]["model_type"], hub_id, papers, {row: of[name] for row, of in asked.items()})
        for name, (hub_id, papers) in PUBLISHED.items()
    ]


def ask(method: str, vlm: "VLM", **options: typing.Any) -> Verdict:
    """What a method says of a model: its `bind` is the judge."""
    from jaxvqa import methods
    from jaxvqa.errors import UserError

    reason, facts = "", vlm.facts
    try:
        bound = methods.bind(methods.resolve(method, **options), facts)
    except UserError as refusal:
        reason, given = str(refusal), stand_ins(method, vlm)
        try:
            bound = methods.bind(methods.resolve(method, **options, **given), facts)
        except UserError:
            return Verdict(False, reason, {})
    return Verdict(True, reason, resolved(bound))


def stand_ins(method: str, vlm: "VLM") -> dict[str, typing.Any]:
    """In place of what only the user can give: for VIF a generator that fits the model, without weights."""
    if method != "vif":
        return {}
    from jaxvqa.vif import GeneratorConfig, Trained, layer_pairs
    from jaxvqa.vif.generator import specs

    config, pairs = GeneratorConfig.of(vlm.config.decoder.width), layer_pairs(vlm.config.decoder.num_layers)
    return {"generator": Trained(config, specs(config), vlm.facts.fingerprint, vlm.name, pairs, 0.5)}


def resolved(method: typing.Any) -> dict[str, typing.Any]:
    """The options of a bound method that are not the defaults, as far as JSON can say them."""
    if not dataclasses.is_dataclass(method):
        return {}
    values = {f.name: (getattr(method, f.name), f.default) for f in dataclasses.fields(method)}
    plain = (bool, int, float, str)
    return {
        name: value
        for name, (value, default) in values.items()
        if value != default
        if isinstance(value, plain) or (type(value) is tuple and all(isinstance(v, plain) for v in value))
    }


def choices(kind: typing.Any) -> Iterator[tuple[str, typing.Any]]:
    """(option, value) for each value that an option of a method may have beside its default."""
    if not dataclasses.is_dataclass(kind):
        return
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        for literal in (hint, *typing.get_args(hint)):
            if typing.get_origin(literal) is typing.Literal:
                yield from ((field.name, value) for value in typing.get_args(literal) if value != field.default)


def abstract(name: str) -> "VLM":
    """A published model without its weights and its tokenizer: all that methods may know of it."""
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    from jaxvqa.models import config_from_hf
    from jaxvqa.vlm import VLM

    published = read(name)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps(published["preprocessor"]))
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
    config = config_from_hf(published["config"])
    return VLM(config, None, None, processor, name="this model", eos_ids=(0,), qformer_tokenizer=object())


def read(name: str) -> dict[str, typing.Any]:
    return json.loads((CONFIGS / f"{name}.json").read_text())

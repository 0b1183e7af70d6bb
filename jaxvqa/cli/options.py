"""`--option k=v` against the dataclass of a method: names checked, values typed, faults said with what is allowed."""

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence

from jaxvqa.errors import UserError
from jaxvqa.methods import method_name, unknown

_BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def parse_options(options: typing.Any, pairs: Sequence[str]) -> dict[str, object]:
    """The keyword arguments for the dataclass `options` that the strings `k=v` say; raises UserError on any fault.

    Anything else (a plain generator function) has no options.
    """
    fields = dataclasses.fields(options) if dataclasses.is_dataclass(options) else ()
    hints = typing.get_type_hints(options) if fields else {}
    known = {field.name: hints[field.name] for field in fields if field.init}
    parsed = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            raise UserError(f"--option {pair!r} is not of the form name=value")
        if name not in known:
            raise unknown("option", name, known, of=f"method {method_name(options)}")
        if name in parsed:
            raise UserError(f"--option {name} is given twice")
        try:
            parsed[name] = convert(text.strip(), known[name])
        except ValueError:
            raise UserError(f"--option {name}={text}: expected {describe(known[name])}") from None
    return parsed


def convert(text: str, hint: object) -> object:
    """`text` as a value of the annotated type `hint`; raises ValueError where it is none."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is bool:
        return _pick(_BOOLS, text.lower())
    if hint in (int, float, str):
        return hint(text)
    if hint is types.NoneType:
        return _pick({"none": None}, text.lower())
    if origin is typing.Literal:
        return _pick({str(value): value for value in inner}, text)
    if origin in (typing.Union, types.UnionType):
        # None first and str last: "none" is no string, and "3" no string where an int will do.
        for choice in sorted(inner, key=lambda kind: (kind is not types.NoneType, kind is str)):
            try:
                return convert(text, choice)
            except ValueError:
                continue
    if origin is tuple:
        parts = [part.strip() for part in text.strip("()").split(",") if part.strip()]
        kinds = inner[:1] * len(parts) if inner[1:] == (...,) else inner
        if len(kinds) != len(parts):
            raise ValueError(text)
        return tuple(convert(part, kind) for part, kind in zip(parts, kinds, strict=True))
    raise ValueError(text)


def describe(hint: object) -> str:
    """The annotated type as a user reads it: `int`, `true or false`, `corrected | official`, `int, int, ...`."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is bool:
        return "true or false"
    if hint is types.NoneType:
        return "none"
    if origin is typing.Literal:
        return " | ".join(map(str, inner))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(describe, inner))
    if origin is tuple:
        return ", ".join("..." if kind is ... else describe(kind) for kind in inner)
    return getattr(hint, "__name__", str(hint))


def _pick(values: Mapping[str, object], text: str) -> object:
    if text not in values:
        raise ValueError(text)
    return values[text]

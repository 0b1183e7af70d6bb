"""List the methods with their options; with a NAME, say what each option means.

Options are given to other commands as --option name=value.

Example: jaxvqa methods vicrop
"""

import argparse
import ast
import dataclasses
import inspect
import itertools
import textwrap
import typing

from jaxvqa.cli.options import describe
from jaxvqa.cli.output import table


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="one method, in detail")


def run(args: argparse.Namespace) -> int:
    from jaxvqa import methods

    if args.name:
        print(detail(args.name, methods.get(args.name)))
        return 0
    rows = []
    for name in methods.names():
        kind = methods.get(name)
        defaults = "\n".join(f"{option.name}={default}" for option, default, _ in options(kind))
        rows.append((name, wrapped(summary(kind)), wrapped(getattr(kind, "paper", "")), defaults))
    print(table(("method", "what it does", "paper", "options"), rows))
    return 0


def detail(name: str, kind: typing.Any) -> str:
    """One method: what it does, where it comes from, and its options with type, default and meaning."""
    meanings = attribute_docs(kind)
    rows = [
        (o.name, describe(hint), default, wrapped(meanings.get(o.name, ""), 70)) for o, default, hint in options(kind)
    ]
    head = "\n".join(filter(None, (f"{name}: {inspect.getdoc(kind)}", getattr(kind, "paper", ""))))
    return f"{head}\n\n{table(('option', 'type', 'default', 'meaning'), rows)}"


def summary(kind: typing.Any) -> str:
    return (inspect.getdoc(kind) or "").partition("\n")[0].rstrip(".")


def options(kind: typing.Any) -> list[tuple[dataclasses.Field, str, object]]:
    """(field, default as typed on the command line, annotated type) of each option of a method."""
    if not dataclasses.is_dataclass(kind):
        return []
    hints, found = typing.get_type_hints(kind), []
    for field in dataclasses.fields(kind):
        made = field.default_factory() if field.default_factory is not dataclasses.MISSING else "required"
        default = made if field.default is dataclasses.MISSING else field.default
        found.append((field, _typed(default), hints[field.name]))
    return found


def attribute_docs(kind: typing.Any) -> dict[str, str]:
    """The strings that follow the fields of a class, which Python itself throws away."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    return {
        field.target.id: " ".join(str(doc.value.value).split())
        for field, doc in itertools.pairwise(getattr(definition, "body", []))
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant)
    }


def wrapped(text: str, width: int = 44) -> str:
    return "\n".join(textwrap.wrap(text, width))


def _typed(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if dataclasses.is_dataclass(value):
        return f"{type(value).__name__}()"
    return "none" if value is None else str(value)

"""The command line, one file per command: each says what it accepts (`arguments`) and does it (`run`).

Nothing here imports jax before a command runs, so that help is immediate. Exit codes: 0 all well, 1 something failed
while working (a sample, a missing part of the installation), 2 the request itself was wrong.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from jaxvqa.cli import ask, convert, demo, doctor, methods, models
from jaxvqa.cli.output import WRONG_PATH, error_text
from jaxvqa.errors import JaxVQAError

COMMANDS = {"demo": demo, "ask": ask, "convert": convert, "models": models, "methods": methods, "doctor": doctor}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"jaxvqa: {message} (see: {self.prog} --help)\n")


class _Version(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        from importlib.metadata import version

        print(f"jaxvqa {version('jaxvqa')}")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; parsing sets `command` to one of `COMMANDS`."""
    parser = _Parser(
        prog="jaxvqa",
        description="Fine-grained visual question answering from inside multimodal LLMs: a picture and a question go "
        "in, an answer with its evidence comes out.",
        epilog="example:\n  jaxvqa demo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="print the traceback of an error")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and leave")
    debug = _Parser(add_help=False)
    # Without a default of its own, so that it does not undo the flag before the command.
    debug.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for name, command in COMMANDS.items():
        summary, _, example = (command.__doc__ or "").partition("Example:")
        commands.add_parser(
            name,
            parents=[debug],
            help=summary.partition("\n")[0].rstrip("."),
            description=summary.strip(),
            epilog=f"example:\n  {example.strip()}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.arguments(commands.choices[name])
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; an error is one line on stderr, with `--debug` its traceback too."""
    args = build_parser().parse_args(argv)
    try:
        code = COMMANDS[args.command].run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader (`| head`) has seen enough; keep the interpreter's own last flush quiet
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("jaxvqa: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        wrong_request = isinstance(error, (JaxVQAError, *WRONG_PATH))
        hint = "" if wrong_request or args.debug else " (--debug shows where)"
        print(f"jaxvqa: {error_text(error)}{hint}", file=sys.stderr)
        return 2 if wrong_request else 1

"""The command `minidiff`: one module per subcommand, each with `add_arguments(parser)` and `run(args)`.

Only the module of the subcommand that is asked for is imported, and torch not before the arguments are known
to be right, so that --help and errors come at once. Exit status: 0 done, 2 an error (one line on stderr), 130
interrupted.
"""

import argparse
import importlib
import sys
import warnings

import minidiff

COMMANDS = {  # name -> what it does; the module is minidiff.cli.NAME
    "generate": "draw pictures of a text",
    "img2img": "draw a picture again as a text says",
    "inpaint": "paint a part of a picture anew as a text says",
    "interpolate": "draw the way from one text and seed to another, as an animation",
    "sample": "draw pictures without a text",
    "compare": "draw a contact sheet: a prompt by many samplers, in different numbers of steps",
    "samplers": "list the samplers and how fast they converge, and plot it",
    "info": "show what a checkpoint holds",
    "convert": "make a folder of a single file such as v1-5-pruned.ckpt",
    "train": "train the checkpoints that ship with minidiff",
    "score": "measure how well pictures follow their texts",
}
EXAMPLES = """examples:
  minidiff generate "a large red sphere left of a small blue cube"
  minidiff generate --like picture.png --seed 7
  minidiff sample --count 4
  minidiff info scenes

Each command tells more: minidiff generate --help"""


class UsageError(Exception):
    """The arguments do not fit; the message is one line."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, like all errors here, without the whole usage in front."""

    _between = False

    def error(self, message):
        """Raises UsageError, which main prints."""
        words = message.removeprefix("unrecognized arguments: ")
        if words != message and not words.startswith("-"):
            message += '; a text of several words needs quotes, like "a red cube"'
        raise UsageError(f"{self.prog}: {message} (see {self.prog} --help)")

    def parse_known_args(self, args=None, namespace=None):
        """As argparse's, but options may stand between several words: `img2img a.png --steps 9 "a cube"`."""
        words = self._get_positional_actions()
        if self._between or len(words) < 2:
            return super().parse_known_args(args, namespace)
        self._between = True  # what follows comes back to this method
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._between = False


def main(argv: list[str] | None = None) -> int:
    """Runs the command line argv (sys.argv[1:] if None) and returns its exit status: 0, 2 or 130."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            args = _parser(argv).parse_args(argv)
            args.run(args)
        return 0
    except UsageError as error:
        return _fail(error)
    except KeyboardInterrupt:
        return _fail("minidiff: interrupted; no file was left half-written", status=130)
    except OSError as error:
        path = f"{error.filename}: " if error.filename else ""
        return _fail(f"minidiff: {path}{error.strerror or error}")
    except (ValueError, RuntimeError, MemoryError) as error:  # ours, and torch's when memory runs out
        return _fail(f"minidiff: {error or type(error).__name__}")


def _parser(argv):
    """The parser; only the command that argv asks for gets its arguments, since they need its module."""
    parser = Parser(
        prog="minidiff",
        description="Stable Diffusion and DDPM in code that one person can read, change and trust.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"minidiff {minidiff.__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    asked = next((word for word in argv if not word.startswith("-")), None)
    for name, what in COMMANDS.items():
        command = subparsers.add_parser(name, help=what, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name == asked:
            module = importlib.import_module(f"minidiff.cli.{name}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser


def _show_warning(message, category, filename, lineno, file=None, line=None):
    """A warning as one line, without the place in the code that it came from."""
    print(f"minidiff: {message}", file=sys.stderr)


def _fail(message, status=2):
    print(" ".join(str(message).split()), file=sys.stderr)
    return status

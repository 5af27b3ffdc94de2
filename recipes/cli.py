"""Entry point ``vgg-transfer VERB``: parses flags, runs the subcommand, and turns exceptions into a
one-line message and an exit status.

Exit status: 0 success, or the reader of standard output closed it (``| head``); 1 an error (one
line on standard error; ``--debug`` shows the traceback), 2 wrong usage, 130 or 143 interrupted
(Ctrl-C, SIGTERM). Nothing here imports TensorFlow, so that ``--help`` is fast.
"""

from __future__ import annotations

import itertools
import os
import pkgutil
import re
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import cyclopts
from cyclopts import App, Parameter

from recipes import console, terminal
from recipes.flag_groups import GENERAL
from recipes.flag_values import flag_of
from transfer.core import yaml_files


def completion(
    shell: Annotated[
        Literal["bash", "zsh", "fish"] | None, Parameter(help="[default: the shell in use]")
    ] = None,
    /,
) -> int:
    """Print a script that completes commands and flags: eval "$(vgg-transfer completion bash)"."""
    script = app.generate_completion(shell=shell)
    # Bash: files where nothing else fits, such as after --model and --csv, whose values are text.
    print(script.replace("\ncomplete -F ", "\ncomplete -o default -F "))
    return 0


# In the order of the work, in which --help shows them.
_COMMANDS = {
    "check-data": "recipes.check_data:check_data",
    "pull": "recipes.pull:pull",
    "convert": "recipes.convert:convert",
    "inspect": "recipes.inspect:inspect",
    "plan": "recipes.plan:plan",
    "lr-find": "recipes.lr_find:lr_find",
    "finetune": "recipes.finetune:finetune",
    "evaluate": "recipes.evaluate:evaluate",
    "predict": "recipes.predict:predict",
    "predict-beam": "recipes.predict_beam:predict_beam",
    "serve": "recipes.serve:serve",
    "features": "recipes.features:features",
    "export": "recipes.export:export",
    "benchmark": "recipes.benchmark:benchmark",
    "cache": "recipes.cache:cache",
    "pretrain": "recipes.pretrain:pretrain",
    "completion": "recipes.cli:completion",
}
VERBS = tuple(_COMMANDS)
_CHILDREN = {  # processes of benchmark
    "benchmark-limits": "recipes.benchmark:benchmark_limits",
    "keras-baseline": "recipes.benchmark:keras_baseline",
}
_GENERAL_FLAGS = ("--version", "--help", "--config", "--quiet", "--debug")
_REPEATABLE = ("feed", "rename", "hidden", "baseline", "leave_out")

app = App(
    name="vgg-transfer",
    help="Transfer learning with pretrained VGG networks that come as TensorFlow meta graphs.",
    version=lambda: version("vgg-transfer"),
    result_action="return_value",
    default_parameter=Parameter(negative_iterable=()),
)
app.suppress_keyboard_interrupt = app.meta.suppress_keyboard_interrupt = False  # see main
for place, (verb, command) in enumerate((_COMMANDS | _CHILDREN).items()):
    function = pkgutil.resolve_name(command)
    app.command(function, name=verb, sort_key=place, show=verb in _COMMANDS)


@app.meta.default
def _launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    config: Annotated[Path | None, Parameter(group=GENERAL)] = None,
    quiet: Annotated[bool, Parameter(negative=(), group=GENERAL)] = False,
    debug: Annotated[bool, Parameter(negative=(), group=GENERAL)] = False,
) -> Any:
    """Transfer learning with pretrained VGG networks that come as TensorFlow meta graphs.

    Args:
        config: A YAML file with flags, such as a run's config.yaml; command-line flags override it.
        quiet: Show results, warnings and errors only, no progress.
        debug: Show the traceback of an error.
    """
    del debug  # read in main, where errors are caught
    # cyclopts leaves these to predict, whose arguments may start with a hyphen.
    words = [token for token in tokens if token not in ("--quiet", "--debug")]
    console.set_quiet(quiet or "--quiet" in tokens)
    if config is not None:
        flags = yaml_files.read_flags(config.expanduser())
        for name, value in flags.items():  # cyclopts before 5.4 takes the first of a list
            if isinstance(value, list) and name not in _REPEATABLE:
                raise ValueError(f"{str(config)!r}: {name} is the list {value}; expected one value")
        # Keyed by verb: in a flat file, cyclopts ignores flags named like a verb (cache).
        by_verb = dict.fromkeys((*VERBS, *_CHILDREN), flags)
        app.config = (cyclopts.config.Dict(by_verb, source=str(config)),)
    _check_whole_numbers(words, {} if config is None else flags)
    return app(words, exit_on_error=False, print_error=False)


def _check_whole_numbers(words: Sequence[str], flags: Mapping[str, Any]) -> None:
    """Refuse fractions as whole numbers, which cyclopts would round."""
    if not words or words[0] not in _COMMANDS:
        return
    given = [word.split("=", 1) for word in words if "=" in word]
    given += map(list, itertools.pairwise(words))
    given += [[flag_of(name), str(value)] for name, value in flags.items()]
    values = {flag: text for flag, text in given if re.fullmatch(r"[+-]?\d*\.\d*[1-9]\d*", text)}
    for argument in app[words[0]].assemble_argument_collection() if values else ():
        kinds = (argument.hint, *get_args(argument.hint))
        for flag in (
            values.keys() & {*argument.names} if int in kinds and float not in kinds else ()
        ):
            raise cyclopts.CycloptsError(
                msg=f"Invalid value {values[flag]!r} for {flag}: expected a whole number."
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if "keras-baseline" not in arguments:  # the baseline keeps TensorFlow's defaults
        # TensorFlow enables oneDNN on some CPUs only; AVX2 gains as much. See docs/performance.md.
        os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    app.config = ()  # drop the config of an earlier call, which parsing --config would read
    with terminal.escaping():
        return _run(arguments)


def _run(arguments: list[str]) -> int:
    try:
        status = app.meta(arguments, exit_on_error=False, print_error=False) or 0
        sys.stdout.flush()
        return status
    except cyclopts.CycloptsError as error:
        hint = ""
        if isinstance(error, cyclopts.UnknownCommandError) and arguments[0].startswith("--"):
            hint = console.did_you_mean(arguments[0], _GENERAL_FLAGS)  # cyclopts knows verbs only
        print(f"error: {_one_line(error)}{hint} (see --help)", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"error: {terminal.escaped(str(error)) or 'interrupted'}", file=sys.stderr)
        return error.status if isinstance(error, console.Stopped) else 130
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # from rich, which prints --help
            return 0
        raise
    except Exception as error:
        if isinstance(error, BrokenPipeError):
            # Which stream is closed: stdout (predict | head -1), or stderr?
            closed = [terminal.is_closed(stream) for stream in (sys.stdout, sys.stderr)]
            if any(closed):
                return 0 if closed[0] else 141  # as for a process killed by SIGPIPE
        if "--debug" in arguments:
            raise
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 1


def _one_line(error: BaseException) -> str:
    text = console.with_flags(" ".join(str(error).split()))
    # Exceptions raised on purpose have clear messages; others need their type.
    expected = (ValueError, ArithmeticError, OSError, cyclopts.CycloptsError)
    return text if text and isinstance(error, expected) else f"{type(error).__name__}: {text}"

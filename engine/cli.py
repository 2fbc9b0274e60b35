"""Command lines, made from signatures and dataclasses: `mentorch …` and the recipes' options.

Nothing heavy is imported here: the screen of `mentorch --help` must be there at once, and every
command imports what it needs itself.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import mentorch
from mentorch.engine.exits import run_cleanly

if TYPE_CHECKING:
    from mentorch.engine.config import RunConfig

C = TypeVar("C", bound="RunConfig")

# ---- Recipes ------------------------------------------------------------------------------------


def parse(kind: type[C], default: C, arguments: Sequence[str] | None = None) -> C:
    """A recipe's configuration from its defaults, or a run's saved ones, and the command line.

    Args:
        kind: the recipe's dataclass.
        default: its values where the command line says nothing.
        arguments: of the command line; the process's own by default.

    Raises:
        ValueError, FileNotFoundError: ``--resume`` names no run folder of this recipe.
    """
    import tyro

    from mentorch.engine.config_files import load_config

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    resumed, folder = (_value_of(option, arguments) for option in ("--resume", "--folder"))
    saved = Path(resumed or folder or "") / "config.json"
    if resumed or (folder and saved.is_file()):
        default = replace(load_config(saved, kind), resume=None, folder=None)
    about = sys.modules["__main__"].__doc__
    return tyro.cli(kind, default=default, args=arguments, description=about)


def _value_of(option: str, arguments: Sequence[str]) -> str | None:
    for at, word in enumerate(arguments):
        if word == option and at + 1 < len(arguments):
            return arguments[at + 1]
        if word.startswith(f"{option}="):
            return word.split("=", 1)[1]
    return None


# ---- mentorch … ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """A command: `function` is imported only when it is given. Its signature is the options."""

    name: str
    operands: str
    about: str
    function: str

    def load(self) -> Callable[..., Any]:
        """Imports the function."""
        module, _, name = self.function.partition(":")
        return getattr(import_module(f"mentorch.engine.{module}"), name)  # type: ignore[no-any-return]


GROUPS: dict[str, tuple[Command, ...]] = {
    "Data sets": (
        Command("index webvision", "ROOT", "index WebVision 1.0, verify every image",
                "data.commands:webvision"),
        Command("index imagenet", "ROOT", "the same of ImageNet (ILSVRC-2012)",
                "data.commands:imagenet"),
        Command("index folder", "ROOT", "the same of a folder of class folders",
                "data.commands:folder"),
        Command("noise", "INDEX", "put label noise on an index", "data.commands:noise"),
        Command("shard", "INDEX OUT", "write its images as tar shards", "data.commands:shard"),
    ),
    "Wrong labels": (
        Command("find-issues", "FOLDER", "a data set's wrong labels, without a run of your own",
                "issues.command:find_issues"),
        Command("report", "RUN", "a run's most suspicious labels, as a page and a table",
                "report.command:report"),
    ),
    "Curricula": (
        Command("show curriculum", "NAME", "draw one: PNG, or an HTML page",
                "report.show:curriculum"),
        Command("train-mentor", "--out FILE", "learn a MentorNet from a known curriculum",
                "mentor_training:train_mentor"),
        Command("mentor-table", "--out FILE", "how well each architecture learns each of them",
                "fit_table:mentor_table"),
    ),
    "This machine": (
        Command("doctor", "", "what works here, and what to do about what does not",
                "doctor:doctor"),
    ),
}  # fmt: skip
COMMANDS = {command.name: command for group in GROUPS.values() for command in group}
SHELLS = ("bash", "zsh", "fish")

_HEAD = """mentorch {version}: train image classifiers on labels that are partly wrong

Training starts from a recipe, in a clone of the repository:
  torchrun recipes/webvision_irv2.py              real digits, minutes on two cores
  torchrun recipes/webvision_irv2.py --dry-run    the plan: steps, memory, time; trains nothing
  torchrun recipes/webvision_irv2.py --help       all its options
"""
_TAIL = f"""
Options
  mentorch COMMAND --help               its options, with units and defaults
  mentorch --version
  mentorch --print-completion SHELL     a script that completes commands and options:
                                        {", ".join(SHELLS)}
Examples
  mentorch index folder /data/mine
  mentorch noise /data/mine/folder.index.parquet --rate 0.4 --seed 1
  mentorch show curriculum pd --out pd.html
  mentorch report runs/webvision_irv2-20260101-120000

Exit status: 0 fine, 1 failed, 2 wrong input, 130 interrupted, 141 nobody reads the output."""

# Where tyro has nothing it gives one empty word.
_BASH_FILES = """_mentorch() { _tyro_mentorch "$@"; [[ -n ${COMPREPLY[0]} ]] || COMPREPLY=(); }
complete -o default -F _mentorch mentorch"""


def main() -> None:
    """The console script."""
    sys.exit(run_cleanly(lambda: _main(sys.argv[1:])))


def _main(words: Sequence[str]) -> Any:
    if not words or words[0] in ("-h", "--help"):
        return print(screen())
    if words[0] == "--version":
        return print(f"mentorch {mentorch.__version__}")
    if words[0] == "--print-completion":
        return print_completion(words[1:])
    for length in (1, 2):
        command = COMMANDS.get(" ".join(words[:length]))
        if command is not None:
            return _call(command, words[length:])
    return _not_a_command(words)


def screen() -> str:
    """What `mentorch --help` prints."""
    lines = [_HEAD.format(version=mentorch.__version__)]
    for title, commands in GROUPS.items():
        lines += [title, *_lines(commands)]
    return "\n".join(lines) + "\n" + _TAIL


def _lines(commands: Iterable[Command]) -> Iterator[str]:
    for command in commands:
        yield f"  {f'mentorch {command.name} {command.operands}':<36}  {command.about}"


def _call(command: Command, words: Sequence[str]) -> Any:
    import tyro

    return tyro.cli(command.load(), prog=f"mentorch {command.name}", args=list(words))


def _not_a_command(words: Sequence[str]) -> Any:
    first, *others = words
    within = [name for name in COMMANDS if name.startswith(f"{first} ")]
    if within and not others:
        kinds = ", ".join(name.split()[1] for name in within)
        raise ValueError(
            f"mentorch {first} is not complete: one of {kinds} follows; "
            f"mentorch {first} --help says what they are"
        )
    if within and others[0] in ("-h", "--help"):
        lines = _lines(COMMANDS[name] for name in within)
        return print("\n".join([f"mentorch {first} is one of", *lines]))
    if within:
        near = get_close_matches(" ".join(words[:2]), within, n=1)
        likely = near or [f"{name} {others[0]}" for name in within if Path(others[0]).exists()]
        raise ValueError(_unknown(f"mentorch {first} {others[0]}", likely or within))
    # A slip in the first word, whether one word or two make the command.
    near = get_close_matches(first, [name.split()[0] for name in COMMANDS], n=1, cutoff=0.5)
    raise ValueError(_unknown(f"mentorch {first}", [n for n in COMMANDS if n.split()[0] in near]))


def _unknown(given: str, likely: Sequence[str]) -> str:
    meant = " or ".join(f"mentorch {name}" for name in likely)
    return f"there is no command {given!r}" + (
        f"; did you mean {meant}?" if meant else "; mentorch --help shows what there is"
    )


def print_completion(words: Sequence[str]) -> None:
    """Prints the completion script of a shell, made from the signatures of all commands.

    Args:
        words: the shell's name.

    Raises:
        ValueError: not one of `SHELLS`.
    """
    if len(words) != 1 or words[0] not in SHELLS:
        raise ValueError(
            f"--print-completion takes one of {', '.join(SHELLS)}, got {' '.join(words) or 'none'}"
        )
    import tyro

    app, groups = tyro.extras.SubcommandApp(), {}
    for command in COMMANDS.values():
        first, _, second = command.name.partition(" ")
        if second and first not in groups:
            groups[first] = tyro.extras.SubcommandApp()
            app.command(groups[first], name=first)
        groups.get(first, app).command(name=second or first)(command.load())
    script = StringIO()
    try:
        with redirect_stdout(script):
            app.cli(prog="mentorch", args=["--tyro-print-completion", *words])
    except SystemExit as ended:  # tyro's way to return
        if ended.code:
            raise
    print(_with_files(words[0], script.getvalue()))


def _with_files(shell: str, script: str) -> str:
    """tyro completes no operands: then files are meant."""
    if shell == "fish":
        return script.replace("--no-files ", "")
    if shell == "zsh":
        return script.replace("' completion_array\n", "' completion_array || _files\n")
    return script + _BASH_FILES

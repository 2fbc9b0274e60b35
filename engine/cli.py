"""Command lines, made from signatures and dataclasses: `mentorch …` and the recipes' options."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import tyro

from mentorch.engine.config_files import C, load_config
from mentorch.engine.failure import RunFailed

FAILED, USER_ERROR = 1, 2  # exit statuses
_USER_ERRORS = (ValueError, FileNotFoundError, NotADirectoryError, PermissionError, ImportError)


def run_cleanly(function: Callable[[], Any]) -> int:
    """Runs a command; what is wrong with the input becomes one line and exit status 2."""
    try:
        result = function()
    except _USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except RunFailed as error:
        if os.environ.get("RANK", "0") == "0":  # all ranks say the same
            print(f"error: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return result if isinstance(result, int) else 0


def parse(kind: type[C], default: C, arguments: Sequence[str] | None = None) -> C:
    """A recipe's configuration from its defaults, or a run's saved ones, and the command line.

    Args:
        kind: the recipe's dataclass.
        default: its values where the command line says nothing.
        arguments: of the command line; the process's own by default.

    Raises:
        ValueError, FileNotFoundError: ``--resume`` names no run folder of this recipe.
    """
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


def main() -> None:
    """`mentorch`: index, noise, shard, train-mentor, mentor-table, report, show, doctor."""
    from mentorch.engine.doctor import doctor

    if sys.argv[1:2] == ["doctor"]:  # by itself: what the others import may be what is missing
        sys.exit(run_cleanly(lambda: tyro.cli(doctor, prog="mentorch doctor", args=sys.argv[2:])))
    from mentorch.engine.data import commands
    from mentorch.engine.fit_table import mentor_table
    from mentorch.engine.mentor_training import train_mentor
    from mentorch.engine.report.command import report
    from mentorch.engine.report.show import curriculum

    app = tyro.extras.SubcommandApp()
    index = tyro.extras.SubcommandApp()
    for function in (commands.webvision, commands.imagenet, commands.folder):
        index.command(function)
    app.command(index, name="index", help="Make the index of a data set; verify its images.")
    app.command(commands.noise)
    app.command(commands.shard)
    app.command(train_mentor)
    app.command(mentor_table)
    app.command(report)
    show = tyro.extras.SubcommandApp()
    show.command(curriculum)
    app.command(show, name="show", help="Draw a curriculum: PNG, or one HTML page.")
    app.command(doctor)
    about = "Indexes, label noise, MentorNets, reports. Training starts from recipes/ (torchrun)."
    sys.exit(run_cleanly(lambda: app.cli(description=about)))

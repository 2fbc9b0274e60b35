"""docs/quickstart.md does as it says: its Python runs, its commands and their options exist.

So do those of other pages, and of the README.
"""

import importlib.util
import re
import shlex
import sys

import pytest

from .pages import DOCS, ROOT, code_blocks

PAGES = (
    "docs/quickstart", "docs/curricula", "docs/recipes", "docs/migration", "docs/report", "README",
    "docs/integrations", "docs/command_line", "docs/storage", "docs/finding_issues",
    "docs/data_driven",
)  # fmt: skip
_OTHERS = {  # not ours to look up
    "./setup", "python code/cifar_train_mentornet.py", "tensorboard", "pytest", "apt-get", "echo",
    "aws s3", "mount-s3",
}  # fmt: skip


def commands(page: str) -> list[str]:
    """The commands of a page's bash blocks, without comments."""
    text = "\n".join(code_blocks(ROOT / f"{page}.md", "bash")).replace("\\\n", " ")
    parts = (part for line in text.splitlines() for part in line.split(" #")[0].split(" && "))
    lines = (part.strip() for part in parts)
    return [line for line in lines if line and not line.startswith("#")]


def words_of(command: str) -> list[str]:
    """mentorch SUBCOMMAND …, or recipes/… and its arguments; nothing where it is not ours."""
    words = shlex.split(command)
    words[0] = words[0].removeprefix(".venv/bin/")
    if words[0] in ("torchrun", "python"):
        recipe = next((at for at, word in enumerate(words) if word.startswith("recipes/")), None)
        return words[recipe:] if recipe is not None else []
    return words if words[0] == "mentorch" else []


def of_pages() -> list[tuple[str, str]]:
    return [(page, command) for page in PAGES for command in commands(page)]


def subcommands(words: list[str]) -> list[str]:
    """Of `mentorch`; a recipe has none."""
    if words[0] != "mentorch" or words[1].startswith("-"):
        return []
    return words[1 : 3 if words[1] in ("index", "show") else 2]


@pytest.fixture(scope="module")
def known() -> dict[tuple[str, ...], str]:
    """What `help_of` has found: pages name the same commands."""
    return {}


def help_of(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys) -> str:
    """What a command says about its options, without running it."""
    if words[0] == "mentorch":
        from mentorch.engine.cli import main
    else:
        path = ROOT / words[0]
        spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look there
        spec.loader.exec_module(module)
        main = module.main
    monkeypatch.setattr(sys, "argv", [words[0], *subcommands(words), "--help"])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (0, None)
    return capsys.readouterr().out


@pytest.mark.parametrize(("page", "command"), of_pages())
def test_the_command_and_its_options_exist(page, command, known, monkeypatch, capsys):
    words = words_of(command)
    if not words:
        assert any(other in command for other in _OTHERS), f"{command}: whose command is this?"
        return
    key = (words[0], *subcommands(words))
    if key not in known:
        known[key] = help_of(words, monkeypatch, capsys)
    said = known[key]
    options = [word.split("=")[0] for word in words if word.startswith("--")]
    missing = [option for option in options if not re.search(rf"(?<![\w-]){option}(?![\w-])", said)]
    assert missing == []


@pytest.mark.parametrize(("page", "least"), [("docs/quickstart", 5), ("README", 10)])
def test_commands_are_found(page, least):
    """Against a pattern that finds none."""
    assert sum(bool(words_of(command)) for command in commands(page)) >= least


def test_the_python_runs_and_prints_what_the_page_shows(capsys):
    """On other releases of torch the digits may differ, but not what they show."""
    page = DOCS / "quickstart.md"
    exec("\n".join(code_blocks(page, "python")), {"__name__": "quickstart"})
    number = r"(0\.\d{3})"
    line = rf"{number} with plain cross-entropy, {number} under MentorNet PD"
    printed = re.search(line, capsys.readouterr().out)
    shown = re.search(line, page.read_text(encoding="utf-8"))
    assert printed
    assert shown
    for seen in (printed, shown):
        plain, weighted = map(float, seen.groups())
        assert weighted > plain + 0.1
    assert abs(float(printed[2]) - float(shown[2])) < 0.03

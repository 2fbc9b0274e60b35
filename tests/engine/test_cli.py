"""`mentorch …`: its screen, its exit statuses, what it says to mistakes, and completion."""

import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mentorch.engine import cli
from mentorch.engine.exits import FAILED, INTERRUPTED, NO_READER, USER_ERROR

HEAVY = {"torch", "numpy", "pyarrow", "matplotlib", "timm", "tyro", "cattrs"}


def run(*words):
    """`mentorch …` in a process of its own."""
    code = "from mentorch.engine.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=False
    )


@pytest.fixture
def mentorch(monkeypatch, capsys):
    """`mentorch …` in this process: exit status, output, errors."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["mentorch", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capsys.readouterr()

    return call


# ---- The screen ---------------------------------------------------------------------------------


def test_the_screen_names_every_command_and_imports_nothing_heavy():
    code = (
        "import sys; from mentorch.engine import cli; print(cli.screen());"
        f"print('imported:', *(set(sys.modules) & {HEAVY!r}))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *screen, imported = said.stdout.splitlines()
    assert imported.split() == ["imported:"]
    assert all(any(f"  mentorch {name} " in line for line in screen) for name in cli.COMMANDS)
    assert max(map(len, screen)) <= 100


@pytest.mark.parametrize("words", [(), ("-h",), ("--help",)])
def test_no_command_is_a_question_for_the_screen(words, mentorch):
    status, out, err = mentorch(*words)
    assert (status, out, err) == (0, cli.screen() + "\n", "")


def test_version(mentorch):
    assert mentorch("--version") == (0, f"mentorch {cli.mentorch.__version__}\n", "")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_option_says_what_it_is(name):
    """tyro makes the help of the docstring: an option that this leaves out has none."""
    function = cli.COMMANDS[name].load()
    about = inspect.getdoc(function)
    for option in inspect.signature(function).parameters:
        assert f"\n    {option}: " in about, option


def test_a_command_tells_its_options_under_its_own_name(mentorch):
    status, out, err = mentorch("index", "webvision", "--help")
    assert (status, err) == (0, "")
    assert out.startswith("usage: mentorch index webvision")
    assert "(default: False)" in out


# ---- Mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("dcotor",), "did you mean mentorch doctor?"),
        (("trainmentor",), "did you mean mentorch train-mentor?"),
        (("index",), "one of webvision, imagenet, folder follows; mentorch index --help"),
        (("show",), "one of curriculum follows"),
        (("indx",), "did you mean mentorch index webvision or mentorch index imagenet"),
        (("index", "webvisoin", "x"), "did you mean mentorch index webvision?"),
        (("index", "{here}"), "did you mean mentorch index webvision {here} or"),  # kind forgotten
        (("xyzzy",), "mentorch --help shows"),
        (("--print-completion", "csh"), "one of bash, zsh, fish, got csh"),
        (("index", "folder", "{here}/none"), "none does not exist"),
        (("index", "folder", "{here}"), "no class folder with images under {here}"),
        (("index", "folder", "{here}/file"), "is a file, not a folder"),
        (("noise", "{here}/file", "--rate", "0.4"), "is not a mentorch index"),
        (("noise", "{here}/none", "--rate", "0.4"), "there is no index"),
        (("report", "{here}"), "is not a run folder"),
        (("show", "curriculum", "pdd"), "MentorNets shipped: dd,"),
        (("train-mentor", "--out", "{here}/file/x.safetensors"), "name another one"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line_on_stderr_with_the_way_out(words, said, mentorch, tmp_path):
    (tmp_path / "file").touch()
    status, _, err = mentorch(*(word.format(here=tmp_path) for word in words))
    assert status == 2
    assert err.startswith("error: ")
    assert said.format(here=tmp_path) in err
    assert len(err.splitlines()) == 1


def test_an_unknown_option_names_the_nearest(mentorch):
    status, out, err = mentorch("index", "webvision", "x", "--worker", 3)
    assert (status, out) == (2, "")
    assert "--workers" in err


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_a_group_shows_what_is_in_it(word, mentorch):
    status, out, _ = mentorch("index", word)
    assert status == 0
    assert [line.split()[2] for line in out.splitlines()[1:]] == ["webvision", "imagenet", "folder"]


def test_the_screen_and_the_page_list_the_same_statuses():
    page = (Path(__file__).parents[2] / "docs/command_line.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| (\d+) \|", page, re.MULTILINE)
    assert listed == re.findall(r"\d+", cli.screen().splitlines()[-1])
    assert {FAILED, USER_ERROR, INTERRUPTED, NO_READER} == set(map(int, listed)) - {0}


def test_without_the_training_engines_libraries_it_says_what_to_install(tmp_path):
    """The console script is installed without [train] too; the screen is there all the same."""
    code = """
import sys
for name in ("tyro", "cattrs", "pyarrow", "timm", "PIL"):
    sys.modules[name] = None
from mentorch.engine.cli import main
main()
"""
    screen, command = (
        subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True,
                       check=False, cwd=tmp_path)
        for words in ([], ["index", "folder", "x"])
    )  # fmt: skip
    assert (screen.returncode, screen.stdout) == (0, cli.screen() + "\n")
    assert command.returncode == 2
    assert command.stderr.startswith("error: this needs tyro, which is not installed.")
    assert "pip install '.[train]'" in command.stderr


# ---- Completion ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    made = run("--print-completion", "bash")
    assert made.returncode == 0, made.stderr
    path = tmp_path_factory.mktemp("completion") / "mentorch"
    path.write_text(made.stdout)
    return path


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["sh"], {"shard", "show"}),
        (["index", ""], {"-h", "--help", "webvision", "imagenet", "folder"}),
        (["show", "curriculum", "pd", "--lo"], {"--loss-max"}),
        (["noise", "x", "--kind", "pa"], {"pair"}),  # the values of an option
        (["report", "fi"], {"file-of-mine"}),  # an operand: bash's own completion of files
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bash_completes(words, offered, script, tmp_path):
    """As bash does it: the registered function fills COMPREPLY; if with nothing, files are."""
    (tmp_path / "file-of-mine").touch()
    ask = """
source "$1"; shift
[[ $(complete -p mentorch) =~ -o\\ default\\ -F\\ ([^ ]+) ]] || exit 3
COMP_WORDS=(mentorch "$@"); COMP_CWORD=$#; COMPREPLY=()
"${BASH_REMATCH[1]}" mentorch "${@: -1}" "${COMP_WORDS[$#-1]}"
(( ${#COMPREPLY[@]} )) || COMPREPLY=($(compgen -f -- "${@: -1}"))
printf '%s\\n' "${COMPREPLY[@]}"
"""
    said = subprocess.run(
        ["bash", "-c", ask, "bash", script, *words],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    assert set(said.stdout.split()) == offered


@pytest.mark.skipif(not shutil.which("fish"), reason="needs fish")
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("mentorch find-iss", {"find-issues"}),
        ("mentorch find-issues --curr", {"--curriculum"}),
        ("mentorch find-issues file", {"file-of-mine"}),
    ],
)
def test_fish_completes(line, offered, tmp_path, capsys):
    cli.print_completion(["fish"])
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out)
    (tmp_path / "file-of-mine").touch()
    ask = ["fish", "-c", 'source script; complete -C "$argv"', line]
    said = subprocess.run(ask, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert {found.split("\t")[0] for found in said.stdout.splitlines()} == offered


def test_zsh_gets_files_too(capsys):
    """It completes only where somebody types; that was tried by hand."""
    cli.print_completion(["zsh"])
    assert "completion_array || _files\n" in capsys.readouterr().out

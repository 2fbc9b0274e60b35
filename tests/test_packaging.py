"""What a wheel, an sdist and an editable install hold, and do, seen from another folder.

The builds use this environment's setuptools (no network) and a copy of the tree, so that no build/
or *.egg-info is left behind. What was installed is tried by a Python without site-packages
(`-I -S`): this environment's own mentorch cannot answer for it, and nothing else can be needed.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import mentorch

ROOT = Path(__file__).parents[1]
FILES = ["setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"]
FOLDERS = ["mentorch", "engine", "kernels", "tests"]
WEIGHTS = "engine/weights/probe.safetensors"


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def install(wheel: Path, target: Path) -> Path:
    """Puts ``wheel`` into the folder ``target``; --target leaves this environment alone."""
    options = ["--no-deps", "--no-index", "--no-compile", "--target", target]
    run(sys.executable, "-m", "pip", "install", *options, wheel, cwd=target)
    return target


def build(kind: str, source: Path, out: Path) -> Path:
    """Calls setuptools as pip does: the hook ``build_wheel``, ``_sdist`` or ``_editable``."""
    out.mkdir(exist_ok=True)
    code = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    run(sys.executable, "-c", code, out, cwd=source)
    (built,) = out.iterdir()
    return built


def ask(site_packages: Path, expression: str, cwd: Path) -> str:
    """The value of ``expression`` for a Python that has ``site_packages`` and nothing else."""
    code = f"import site; site.addsitedir({str(site_packages)!r}); print({expression})"
    return run(sys.executable, "-I", "-S", "-c", code, cwd=cwd)


def find_spec(name: str) -> str:
    return f"__import__('importlib.util').util.find_spec({name!r})"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the package is built from, with a weight file in it."""
    copy = tmp_path_factory.mktemp("tree")
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=skip)
    for name in FILES:
        shutil.copy(ROOT / name, copy)
    (copy / WEIGHTS).parent.mkdir(exist_ok=True)
    (copy / WEIGHTS).write_bytes(b"weights")
    return copy


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", tree, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(wheel, tmp_path_factory.mktemp("site-packages"))


def files_of(wheel: Path) -> set[str]:
    """What the wheel installs, without its metadata folder."""
    names = zipfile.ZipFile(wheel).namelist()
    return {name for name in names if ".dist-info/" not in name}


def test_wheel_holds_the_whole_package_and_nothing_else(tree: Path, wheel: Path) -> None:
    """A folder without its __init__.py would be missing here, and so would a weight file."""
    files = [path for root in ("engine", "kernels") for path in (tree / root).rglob("*.*")]
    expected = {
        f"mentorch/{path.relative_to(tree)}"
        for path in files
        if path.suffix in {".py", ".safetensors", ".jinja"}
    }
    assert f"mentorch/{WEIGHTS}" in expected
    assert files_of(wheel) == expected | {"mentorch/__init__.py", "mentorch/py.typed"}


def test_sdist_builds_the_same_wheel(tree: Path, wheel: Path, tmp_path: Path) -> None:
    sdist = build("sdist", tree, tmp_path / "sdist")
    run(sys.executable, "-m", "tarfile", "-e", sdist, tmp_path, cwd=tmp_path)
    unpacked = tmp_path / sdist.name.removesuffix(".tar.gz")
    assert files_of(build("wheel", unpacked, tmp_path / "wheel")) == files_of(wheel)


def test_sdist_has_what_is_needed_and_no_junk(tree: Path, tmp_path: Path) -> None:
    """The sources, the tests and their data, the licence; nothing that was only lying about."""
    junk = ("engine/__pycache__/x.pyc", "docs/_build/index.html", "runs/r/config.json", ".env")
    for name in junk:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).touch()
    sdist = build("sdist", tree, tmp_path / "sdist")
    with tarfile.open(sdist) as file:
        held = {name.partition("/")[2] for name in file.getnames()}
    folders = [tree / name for name in ("engine", "kernels", "tests")]
    sources = {str(p.relative_to(tree)) for folder in folders for p in folder.rglob("*.py")}
    assert sources | {*FILES, "mentorch/py.typed", WEIGHTS, "PKG-INFO"} <= held
    assert not held & set(junk)
    assert not [name for name in held if "__pycache__" in name or name.endswith(".pyc")]


def test_installed_wheel_imports_from_anywhere(installed: Path, tmp_path: Path) -> None:
    where = ask(installed, "__import__('mentorch').__file__", cwd=tmp_path)
    assert Path(where) == installed / "mentorch/__init__.py"


@pytest.mark.parametrize("name", ["kernels", "engine"])
def test_installed_wheel_has_no_top_level(name: str, installed: Path, tmp_path: Path) -> None:
    assert ask(installed, find_spec(name), cwd=tmp_path) == "None"


def test_version_is_that_of_the_metadata(installed: Path, tmp_path: Path) -> None:
    in_metadata = "__import__('importlib.metadata').metadata.version('mentorch')"
    assert ask(installed, in_metadata, cwd=tmp_path) == mentorch.__version__
    assert metadata.version("mentorch") == mentorch.__version__, "run ./setup dev again"


def test_editable_install_follows_the_tree(tree: Path, tmp_path: Path) -> None:
    """A file that is added after `pip install -e` is there at once; `kernels` stays hidden."""
    site_packages = install(build("editable", tree, tmp_path / "wheel"), tmp_path)
    new = tree / "kernels/added_later.py"
    new.touch()
    try:
        found = ask(site_packages, find_spec("mentorch.kernels.added_later"), cwd=tmp_path)
    finally:
        new.unlink()
    assert str(new) in found or "mentorch/kernels/added_later.py" in found
    assert ask(site_packages, find_spec("kernels"), cwd=tmp_path) == "None"


def test_import_is_light(tmp_path: Path) -> None:
    """`import mentorch` loads neither torch nor numpy nor the engine, so it takes no time."""
    code = "import sys; old = set(sys.modules); import mentorch; print(*set(sys.modules) - old)"
    loaded = run(sys.executable, "-c", code, cwd=tmp_path).split()
    foreign = [name for name in loaded if name.split(".")[0] not in sys.stdlib_module_names]
    assert foreign == ["mentorch"]


def test_every_dependency_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0] for line in lines}
    declared = {requirement.split(">=")[0] for requirement in metadata.requires("mentorch") or []}
    declared = {name for name in declared if not name.startswith("mentorch[")}  # extras of extras
    assert declared <= pinned


def test_the_loss_needs_none_of_the_training_engines_libraries(tmp_path):
    """`pip install .` without extras brings torch, numpy and safetensors only."""
    script = """
import sys
for name in ("timm", "torchvision", "pyarrow", "PIL", "tyro", "cattrs", "tqdm", "nvidia.dali"):
    sys.modules[name] = None
import torch, mentorch
criterion = mentorch.Reweight("pd", total_steps=10)
print(criterion(torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])).item() > 0)
"""
    assert run(sys.executable, "-c", script, cwd=tmp_path) == "True"


# ---- Installed, without the training engine -----------------------------------------------------

# Everything that mentorch's extras bring, and GPUs, are hidden from a process that has the wheel.
_HIDE = """
import importlib.abc, os, sys
os.environ["CUDA_VISIBLE_DEVICES"] = ""
hidden = {hidden!r}
class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hide())
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in type(f).__module__ + repr(f)]
sys.path.insert(0, {wheel!r})
import mentorch
assert mentorch.__file__.startswith({wheel!r}), mentorch.__file__
"""
# By import name. fsspec and jinja2 are torch's, too.
_EXTRAS = {
    "timm", "torchvision", "pyarrow", "PIL", "tyro", "cattrs", "tensorboard", "tqdm", "matplotlib",
    "sklearn", "nvidia", "lightning", "transformers", "accelerate", "cleanlab", "pandas",
}  # fmt: skip


def run_hidden(wheel: Path, code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    script = _HIDE.format(hidden=_EXTRAS, wheel=str(wheel)) + code
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-c", script], cwd=cwd, capture_output=True, text=True, env=environment
    )


def test_extras_are_hidden_by_their_import_names() -> None:
    """A dependency that is added to [train] has to be hidden too."""
    names = {"pillow": "PIL", "scikit-learn": "sklearn"}
    ours = [r for r in metadata.requires("mentorch") or [] if re.search("extra == .train", r)]
    declared = {re.split(r"[><=; ]", requirement)[0] for requirement in ours}
    assert {names.get(name, name) for name in declared} - {"fsspec", "jinja2"} <= _EXTRAS


def test_the_installed_loss_trains_without_extras_and_gpu(installed: Path, tmp_path: Path) -> None:
    code = """
import torch
model = torch.nn.Linear(5, 3)
criterion = mentorch.Reweight("pd", total_steps=10)
loss = criterion(model(torch.randn(8, 5)), torch.randint(0, 3, (8,)))
loss.backward()
print(mentorch.__version__, bool(model.weight.grad.abs().sum() > 0), torch.cuda.is_available())
"""
    done = run_hidden(installed, code, tmp_path)
    assert done.stdout.split() == [mentorch.__version__, "True", "False"], done.stderr


def test_the_console_script_says_what_is_missing(installed: Path, tmp_path: Path) -> None:
    """As pip writes it: `from mentorch.engine.cli import main`. The screen needs nothing."""
    (entry,) = metadata.entry_points(group="console_scripts", name="mentorch")
    assert (entry.module, entry.attr) == ("mentorch.engine.cli", "main")
    assert (installed / "bin/mentorch").is_file()
    call = f"from {entry.module} import {entry.attr}; sys.argv[1:] = "
    screen = run_hidden(installed, call + "[]; main()", tmp_path)
    assert screen.returncode == 0
    assert screen.stdout.startswith(f"mentorch {mentorch.__version__}")
    report = run_hidden(installed, call + "['report', 'x']; main()", tmp_path)
    assert report.returncode == 2
    assert "pip install '.[train]'" in report.stderr
    assert "Traceback" not in report.stderr


def test_a_users_types_come_from_the_installed_wheel(installed: Path, tmp_path: Path) -> None:
    """mypy follows py.typed: the class is known, and a wrong argument is an error."""
    (tmp_path / "user.py").write_text(
        "import mentorch\n"
        'criterion = mentorch.Reweight("pd", total_steps=10)\n'
        "reveal_type(criterion)\n"
        'mentorch.Reweight("pd", total_steps="ten")\n'
    )
    (tmp_path / "mypy.ini").write_text(  # torch's own types would take minutes
        "[mypy]\nfollow_imports = skip\n[mypy-mentorch.*]\nfollow_imports = silent\n"
    )
    options = ["--no-incremental", "--config-file", "mypy.ini"]
    done = subprocess.run(
        [sys.executable, "-c", "from mypy.__main__ import console_entry; console_entry()",
         *options, "user.py"],
        cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"MYPYPATH": str(installed)},
    )  # fmt: skip
    assert 'Revealed type is "mentorch.engine.reweight.Reweight"' in done.stdout, done.stdout
    assert 'user.py:4: error: Argument "total_steps"' in done.stdout


# ---- The page of the package --------------------------------------------------------------------


def test_long_description_is_the_readme_as_markdown(tree: Path, installed: Path) -> None:
    (info,) = installed.glob("mentorch-*.dist-info")
    head, _, body = (info / "METADATA").read_text(encoding="utf-8").partition("\n\n")
    assert "Description-Content-Type: text/markdown" in head
    assert body.strip() == (tree / "README.md").read_text(encoding="utf-8").strip()


def test_readme_links_lead_somewhere() -> None:
    """Relative ones are files of the repository; a registry's page shows them as text."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)\s]+)\)", readme)
    assert len(targets) > 10
    relative = [target.partition("#")[0] for target in targets if "://" not in target]
    missing = [target for target in relative if not (ROOT / target).exists()]
    assert missing == []

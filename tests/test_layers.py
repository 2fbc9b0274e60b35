"""Who may import whom: kernels <- engine <- recipes, bench (CONTRIBUTING.md, "Layers")."""

import ast
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Folder -> the name it is imported by (mentorch/ also shows engine and kernels, as symlinks).
FOLDERS = {
    "kernels": "mentorch.kernels",
    "engine": "mentorch.engine",
    "mentorch": "mentorch",
    "recipes": "recipes",
    "bench": "bench",
    "tests": "tests",
}
FILES = sorted(
    path
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*.py")
    if path.relative_to(ROOT).parts[:2] not in {("mentorch", "engine"), ("mentorch", "kernels")}
)


def module_name(path: Path) -> str:
    """The dotted name of the package or module in ``path``."""
    folder, *parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([FOLDERS[folder], *parts]).removesuffix(".__init__")


def imports(source: str, module: str, is_package: bool) -> set[str]:
    """Every module that ``source`` imports, anywhere in it, as an absolute dotted name."""
    package = module if is_package else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(source, filename=module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # the first dot is the package, each further one its parent
                parents = package.split(".")
                parents = parents[: len(parents) + 1 - node.level]
                base = ".".join([*parents, *filter(None, [node.module])])
            # `from mentorch import engine` imports mentorch.engine: each name may be a module.
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def within(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def offences(folders: Iterable[str], allowed: Callable[[str], bool]) -> list[str]:
    """Each import that is not allowed in the files of ``folders``, as "file: module"."""
    return [
        f"{path.relative_to(ROOT)}: {name}"
        for path in FILES
        if path.relative_to(ROOT).parts[0] in folders
        for name in sorted(imports(path.read_text(), module_name(path), path.stem == "__init__"))
        if not allowed(name)
    ]


def test_the_walk_sees_the_tree() -> None:
    """A guard against a walk that finds nothing and so passes."""
    seen = {module_name(path) for path in FILES}
    assert {"mentorch", "mentorch.engine", "mentorch.kernels", "mentorch.kernels.philox"} <= seen


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("import a.b as c", {"a.b"}),
        ("from a import b", {"a", "a.b"}),
        ("from . import b", {"mentorch.kernels", "mentorch.kernels.b"}),
        ("from ..engine import b", {"mentorch.engine", "mentorch.engine.b"}),
        ("def f():\n    import late", {"late"}),
    ],
)
def test_imports_are_read_as_python_reads_them(line: str, expected: set[str]) -> None:
    assert imports(line, "mentorch.kernels.x", is_package=False) == expected


def test_kernels_import_only_torch_triton_and_the_standard_library() -> None:
    allowed = {*sys.stdlib_module_names, "torch", "triton", "mentorch.kernels"}
    assert not offences(["kernels"], lambda name: within(name, allowed))


def test_the_package_imports_neither_what_uses_it_nor_its_tests() -> None:
    above = {"recipes", "bench", "tests", "pytest", "hypothesis"}
    assert not offences(["mentorch", "engine", "kernels"], lambda name: not within(name, above))


def test_nothing_imports_recipes_or_bench() -> None:
    assert not offences(FOLDERS, lambda name: not within(name, {"recipes", "bench"}))


def test_no_top_level_kernels_or_engine() -> None:
    """`import kernels` is Hugging Face's package; ours always has its full name."""
    assert not offences(FOLDERS, lambda name: not within(name, {"kernels", "engine"}))

"""The structure holds: import ranks, cheap imports, file sizes, public names."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mergekit

PACKAGE = Path(mergekit.__file__).parent
RANKS = {
    "foundation": 0,
    **dict.fromkeys(["hub", "checkpoint", "kernels", "methods"], 1),
    **dict.fromkeys(["families", "vocab", "adapters"], 2),
    "recipe": 3,
    "planning": 4,
    "moe": 5,
    **dict.fromkeys(["execute", "output"], 6),
    "api": 7,
    "compatibility": 8,
    "cli": 9,
}
"""A file imports only lower ranks, or its own room."""

ROOMS = {
    **dict.fromkeys(["errors", "dtypes", "html", "seeds", "refs", "version"], "foundation"),
    **dict.fromkeys(["config", "merge", "common", "merge_methods"], "compatibility"),
    "options": "api",
    "scripts": "cli",
    "downloads": "hub",
    "uploads": "hub",
}
"""Files that make up a room though they are not in one folder."""

FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str | None:
    """The top-level module or folder that a file belongs to; None for the package's own two files."""
    top = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return None if top in ("__init__", "__main__") else room_called(top)


def room_called(name: str) -> str:
    return ROOMS.get(name, name)


def imports(path: Path) -> set[str]:
    """The rooms of mergekit that a file imports from at run time, anywhere in it."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            # transformers finds the files of a model's own code by their relative imports.
            assert node.level == 0 or path.parent.name == "phi3moe", f"{path}: relative import"
            names = [node.module or ""]
            if node.module == "mergekit":
                names = [f"mergekit.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found.update(room_called(n.split(".")[1]) for n in names if n.startswith("mergekit."))
    return found


@pytest.mark.parametrize("path", [f for f in FILES if room(f)], ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_imports_only_lower_ranks(path):
    mine = room(path)
    for other in imports(path) - {mine}:
        assert RANKS[other] < RANKS[mine], f"{path.relative_to(PACKAGE)} imports {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= 420


def loaded_by(code: str) -> set[str]:
    script = (
        f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\nprint('\\n'.join(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


HEAVY = {"torch", "transformers", "numba", "numpy", "pydantic", "yaml", "huggingface_hub"}


def test_help_imports_nothing_heavy():
    modules = loaded_by("sys.argv = ['mergekit-yaml', '--help']; from mergekit.cli.merge import main; main()")
    assert "click" in modules
    assert not modules & HEAVY


def test_inspecting_a_folder_imports_nothing_heavy(tmp_path):
    from models import family

    folder = str(next(iter(family(tmp_path, 1))))
    modules = loaded_by(f"sys.argv = ['mergekit', 'inspect', {folder!r}]; from mergekit.cli.main import main; main()")
    assert "mergekit.planning.models" in modules
    assert not modules & HEAVY


def test_a_plain_merge_imports_neither_torch_nor_transformers(tmp_path):
    from models import family

    folders = [str(f) for f in family(tmp_path, 2)]
    recipe = {"merge_method": "linear", "models": [{"model": f} for f in folders], "parameters": {"weight": 1}}
    modules = loaded_by(f"import mergekit; mergekit.run_merge({recipe!r}, {str(tmp_path / 'out')!r})")
    assert "numba" in modules
    assert not modules & {"torch", "transformers", "huggingface_hub"}


def test_public_names_are_importable_and_listed():
    assert sorted(mergekit.__all__) == list(mergekit.__all__)
    for name in mergekit.__all__:
        assert getattr(mergekit, name) is not None


def test_names_that_notebooks_import():
    from mergekit.common import ModelReference
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    assert str(ModelReference.parse("a/b@c")) == "a/b@c"
    assert callable(run_merge)
    assert MergeOptions(cuda=False, copy_tokenizer=True, lazy_unpickle=False, low_cpu_memory=False).cuda is False
    assert MergeConfiguration.model_validate({"merge_method": "linear", "models": [{"model": "a"}]})

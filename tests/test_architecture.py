"""The tree is what README and CONTRIBUTING say: rooms, arrows that only point down, light imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"gate4d.kernels": ROOT / "kernels", "gate4d.benchmarks": ROOT / "benchmarks", "gate4d": ROOT / "gate4d"}
# From the bottom up. A room imports from rooms below it and from itself.
ROOMS = (
    "kernels", "core", "statistics", "nn", "integrations", "methods", "handle", "data", "models", "evaluation",
    "benchmarks", "cli",
)  # fmt: skip
CORE = ("gates", "visibility", "moments", "checks", "geometry", "functional", "terminal")
# Where user code, a command, or what a fresh process is to measure is loaded by name.
LOADERS = {"gate4d.cli.source", "gate4d.cli.main", "gate4d.models.zoo", "gate4d.benchmarks.measure.load"}
# What still points the wrong way; nothing does.
KNOWN: set[str] = set()
NO_ROOM: set[str] = set()


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its name when installed."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


def room(module: str) -> str | None:
    """The room a module is in; None for a module of no room."""
    if module == "gate4d":
        return "package"
    name = module.split(".")[1]
    return "core" if name in CORE else name if name in ROOMS else None


@cache
def imports(module: str) -> tuple[tuple[str, str], ...]:
    """(module, name) of each import of a module of the package, those inside functions included; ``from . import x``
    counts as an import of the submodule x where there is one."""
    path = modules()[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(a.name, "") for a in node.names if a.name.partition(".")[0] == "gate4d"]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join((*base, *([node.module] if node.module else [])))
            if source.partition(".")[0] != "gate4d":
                continue
            for a in node.names:
                inner = f"{source}.{a.name}"
                found.append((inner, "") if inner in modules() else (source, a.name))
    return tuple(found)


def arrows() -> Iterator[tuple[str, str, str]]:
    for module in modules():
        for source, name in imports(module):
            yield module, source, name


def test_every_module_is_in_a_room():
    assert {m for m in modules() if room(m) is None} == NO_ROOM


def violations() -> set[str]:
    found = set()
    order = {name: i for i, name in enumerate(ROOMS)}
    for module, source, name in arrows():
        here, there = room(module), room(source)
        if source not in modules():
            found.add(f"{module} imports {source}, which does not exist")
            continue
        if here == "package" and there in ("data", "models", "evaluation", "benchmarks", "cli"):
            found.add(f"gate4d itself imports {source}")
        if here in order and there == "package" and here not in ("benchmarks", "cli", "data", "models", "evaluation"):
            found.add(f"{module} imports from gate4d itself")
        if here in order and there in order and order[there] > order[here]:
            found.add(f"{module} imports {source}, a room above its own")
        if here == there == "kernels":
            a, b = (m.split(".")[2] if len(m.split(".")) > 2 else "" for m in (module, source))
            if a != b and b != "support" and not b.startswith("_") and not a.startswith("_"):
                found.add(f"{module} imports another operator, {source}")
        private = name.startswith("_") and not name.startswith("__")
        private |= any(part.startswith("_") for part in source.split(".")) and here != there
        if private and (here != there or (here == "kernels" and name.startswith("_"))):
            found.add(f"{module} imports the private {source} {name}".rstrip())
    for circle in circles():
        found.add("circle: " + " ".join(sorted(circle)))
    for module, path in modules().items():
        text = path.read_text()
        if module in LOADERS:
            continue
        for word in ("sys.path", "importlib.import_module", "__import__("):
            if word in text:
                found.add(f"{module} uses {word}")
    return found


def circles() -> list[set[str]]:
    """Strongly connected sets of modules; a package counts as the modules its ``__init__`` imports, not as a parent."""
    graph = defaultdict(set)
    for module, source, _ in arrows():
        if source in modules() and source != module:
            graph[module].add(source)
    index, low, stack, on, found = {}, {}, [], set(), []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        on.add(node)
        for to in graph[node]:
            if to not in index:
                visit(to)
                low[node] = min(low[node], low[to])
            elif to in on:
                low[node] = min(low[node], index[to])
        if low[node] == index[node]:
            members = set()
            while node not in members:
                members.add(stack.pop())
            on.difference_update(members)
            if len(members) > 1:
                found.append(members)

    for module in sorted(modules()):
        if module not in index:
            visit(module)
    return found


def test_the_arrows_only_point_down():
    found = violations()
    assert sorted(found - KNOWN) == []
    assert sorted(KNOWN - found) == [], "mended: take it out of KNOWN"


def test_kernels_need_torch_alone():
    """Triton is imported by the files that hold its kernels, or inside functions."""
    for module, path in modules().items():
        if room(module) != "kernels":
            continue
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in {n.partition(".")[0] for n in names} - set(sys.stdlib_module_names):
                holds_kernels = path.stem.startswith("triton") or path.parent.name == "_triton"
                assert name == "torch" or (name == "triton" and holds_kernels), f"{module} imports {name}"


@pytest.mark.parametrize("statement", ["import gate4d", "import gate4d.cli.main"])
def test_the_import_is_light(statement):
    code = f"import torch, numpy, sys; before = set(sys.modules); {statement}; print(*(set(sys.modules) - before))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    extras = {m.partition(".")[0] for m in loaded} - {"gate4d", "torch", "numpy"} - set(sys.stdlib_module_names)
    assert {e for e in extras if not e.startswith("__editable__")} == set()


def test_no_file_is_long():
    for folder in ("gate4d", "kernels", "benchmarks", "csrc", "tests"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".cpp", ".cu", ".cuh", ".h"):
                assert len(path.read_text().splitlines()) <= 600, path


README = (ROOT / "README.md").read_text()


def tree() -> dict[str, str]:
    """Folders of README's tree by path, with the line said of each."""
    block = README[README.index("## Where things are") :].split("```")[1]
    found, above = {}, ""
    for line in block.strip().splitlines():
        name, _, text = line.strip().partition(" ")
        above = above if line.startswith("  ") else name
        found[name if name == above else above + name] = text.strip()
    return found


def test_the_readme_shows_every_folder_and_no_other():
    shown = tree()
    assert all(shown.values()), "a folder without a word"
    assert not [name for name in shown if not (ROOT / name).is_dir()]
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    if not files:
        pytest.skip("not a git checkout")
    folders = {"/".join((*parts[:2], "")) for f in files if len(parts := Path(f).parts) > 2} | {
        f"{Path(f).parts[0]}/" for f in files if len(Path(f).parts) > 1
    }
    hidden = {f for f in folders if f.startswith((".", "tests/"))} - {"tests/"}
    assert folders - hidden - set(shown) == set()


def test_contributing_draws_the_layers_that_are_held():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    lines = text[text.index("## Layers") :].split("```")[1].strip().splitlines()
    drawn = [name for line in reversed(lines) for name in line.split("  ")[0].split(" < ")]
    assert tuple(drawn) == ROOMS
    (core,) = [line for line in lines if line.startswith("core")]
    assert set(core.split(None, 1)[1].split(", ")) == set(CORE)


def test_tests_mirror_the_folders():
    rooms = {"core", "kernels", *(p.name for p in (ROOT / "gate4d").iterdir() if p.is_dir()), "benchmarks"}
    others = {"fuzz", "gpu", "helpers", "standins"}
    for folder in (p for p in (ROOT / "tests").iterdir() if p.is_dir() and p.name != "__pycache__"):
        assert folder.name in rooms | others, folder
    loose = {p.name for p in (ROOT / "tests").glob("test_*.py")}
    assert loose == {"test_architecture.py", "test_readme.py", "test_setup.py"}

"""How large the house is: files, lines, functions and imports of a checkout's package.

    python benchmarks/house.py [CHECKOUT ...]       one row for each; none: this checkout

Imports inside functions count. Parameters: without self and cls, and without those of the Triton kernels.
"""

import ast
import sys
from pathlib import Path

HEAD = "checkout files lines largest-file longest-function most-parameters import-edges most-files-in-a-folder"
Function = ast.FunctionDef | ast.AsyncFunctionDef


def parameters(node: Function) -> int:
    """Count the parameters of a function."""
    names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def imported(tree: ast.Module, modules: set[str]) -> set[str]:
    """Return the modules of the package that a module imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= ({f"{node.module}.{alias.name}" for alias in node.names} & modules) or {node.module}
    return found & modules


def row(checkout: Path) -> list[str]:
    """Count what is in one checkout."""
    files = sorted((checkout / "nearplane").rglob("*.py"))
    name_of = {f: ".".join(f.relative_to(checkout).with_suffix("").parts).removesuffix(".__init__") for f in files}
    trees, modules = {f: ast.parse(f.read_text()) for f in files}, set(name_of.values())
    long, wide = [], []
    for f, tree in trees.items():
        for node in (n for n in ast.walk(tree) if isinstance(n, Function)):
            long.append(((node.end_lineno or 0) - node.lineno + 1, f"{f.stem}.{node.name}"))
            wide.append((0 if f.stem == "triton_kernel" else parameters(node), f"{f.stem}.{node.name}"))
    sizes = [(f.read_text().count("\n"), f.stem) for f in files]
    folders = [f.parent.name for f in files if f.name != "__init__.py"]
    crowded = max((folders.count(name), name) for name in folders)
    edges = sum(len(imported(tree, modules) - {name_of[f]}) for f, tree in trees.items())
    counts = [len(files), sum(size for size, _ in sizes), max(sizes), max(long), max(wide), edges, crowded]
    return [checkout.name, *(f"{c[0]} ({c[1]})" if isinstance(c, tuple) else str(c) for c in counts)]


if __name__ == "__main__":
    names = HEAD.split()
    for cells in (names, ["---"] * len(names), *(row(Path(word).resolve()) for word in sys.argv[1:] or ["."])):
        print("| " + " | ".join(cells).replace("-", " " if cells is names else "-") + " |")

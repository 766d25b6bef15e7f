"""The picture of the house in README.md stays true: imports point down, and brands stay in `families/`."""

import ast
import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "reelflow"

# From the ground up; rooms on one line do not import each other. `errors` and `config` stand below the ground.
FLOORS = [
    {"errors"},
    {"config"},
    {"nn", "diffusion"},
    {"models"},
    {"conditioning", "data", "parallel", "planning", "interop"},
    {"families"},
    {"training", "generation", "evaluation"},
    {"recipes"},
    {"web"},
    {"cli"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
GROUND = {"torch", "einops", "jaxtyping"}
BRANDS = re.compile(
    r"hunyuan|(?<![a-z])wan(?![a-z])|wan2|mochi|cogvideo|(?<![a-z])ltx|(?<![a-z])latte(?![a-z])|opensora|open_sora|(?<![a-z])sd3|stable_?diffusion|"
    r"movie_?gen|cosmos|animate_?diff|svd(?![a-z])|sora(?![a-z])",
    re.IGNORECASE,
)
FILES = sorted(SOURCE.rglob("*.py"))


def room_of(path: Path) -> str:
    part = path.relative_to(SOURCE).parts[0]
    return part.removesuffix(".py")


def imported(tree: ast.AST) -> list[str]:
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            names += [
                f"{node.module}.{alias.name}" if node.module == "reelflow" else str(node.module) for alias in node.names
            ]
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_down(path):
    room = room_of(path)
    if room in ("__init__", "__main__"):
        return
    for name in imported(ast.parse(path.read_text())):
        parts = name.split(".")
        if parts[0] == "reelflow" and parts[1] != room:
            assert FLOOR[parts[1]] < FLOOR[room], f"{room} imports {name}, which is not below it"
        elif room in ("nn", "diffusion") and parts[0] != "reelflow":
            assert parts[0] in GROUND or parts[0] in STANDARD, f"the ground rooms import torch only, not {name}"


STANDARD = {"collections", "dataclasses", "functools", "itertools", "math", "typing"}


@pytest.mark.parametrize(
    "path", [p for p in FILES if room_of(p) != "families"], ids=lambda p: str(p.relative_to(SOURCE))
)
def test_brand_names_stay_in_families(path):
    tree = ast.parse(path.read_text())
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    words = [(n.lineno, n.id) for n in ast.walk(tree) if isinstance(n, ast.Name)]
    words += [(n.lineno, n.attr) for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr != "svd"]
    words += [(n.lineno, n.name) for n in ast.walk(tree) if isinstance(n, (ast.ClassDef, ast.FunctionDef))]
    words += [(n.lineno, n.arg) for n in ast.walk(tree) if isinstance(n, ast.arg)]
    words += [
        (n.lineno, n.value)
        for n in ast.walk(tree)
        if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in docstrings
    ]
    named = [(line, word) for line, word in words if BRANDS.search(word)]
    assert not named, f"brand names below or beside families/: {named}"

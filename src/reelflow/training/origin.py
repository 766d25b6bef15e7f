"""What a run was made by: code, data, libraries and processes; and in which of them two sittings differ."""

import hashlib
import platform
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

__all__ = ["differences", "origin"]

SOURCE = Path(__file__).parents[1]


def origin(*, data: str, world_size: int) -> dict[str, Any]:
    """Describe this sitting in plain JSON values; `data` is a hash of the data, "" where nothing is known."""
    code = {
        str(path.relative_to(SOURCE)): hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        for path in sorted(SOURCE.rglob("*.py"))
    }
    return {
        "reelflow": import_module("reelflow").__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processes": world_size,
        "data": data,
        "code": code,
    }


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Name what changed, one line for each kind."""
    lines = [
        f"{name} was {before.get(name)}, now {value}"
        for name, value in now.items()
        if name != "code" and before.get(name) != value
    ]
    old, new = before.get("code", {}), now["code"]
    changed = sorted(name for name in {**old, **new} if old.get(name) != new.get(name))
    if changed:
        rest = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        lines.append(f"code differs in {', '.join(changed[:3])}{rest}")
    return lines

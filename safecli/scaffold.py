"""A new plugin package, complete: it installs, passes its own tests, and trains."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from string import Template

from safecli import __version__
from safecli.artifacts import atomic_folder
from safecli.errors import InputError, UsageError


def write_plugin(kind: str, name: str, into: Path) -> Path:
    """Write the package `safecli-cost-NAME` into a folder, and return its own.

    Errors: `UsageError` (a kind or name that can't be), `InputError` (it is there already).
    """
    if kind != "cost":
        raise UsageError(f"plugins new {kind}: 'cost' is what can be written")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UsageError(f"plugins new cost {name}: a name is small letters, digits and _, and begins with a letter")
    dashed = name.replace("_", "-")
    folder = into / f"safecli-cost-{dashed}"
    if folder.exists():
        raise InputError(f"{folder} is there already: choose another name, or --in another folder")
    title, next_major = name.title().replace("_", ""), int(__version__.partition(".")[0]) + 1
    words = {"name": name, "dashed": dashed, "title": title, "version": __version__, "next": str(next_major)}
    places = {
        "pyproject.toml": "pyproject.toml",
        "README.md": "README.md",
        "backend.py": f"safecli_cost_{name}/__init__.py",
        "test.py": f"tests/test_{name}.py",
    }
    with atomic_folder(folder) as beside:
        for template, place in places.items():
            text = files("safecli").joinpath("data", "plugin", f"{template}.tmpl").read_text(encoding="utf-8")
            path = beside / place
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(Template(text).substitute(words), encoding="utf-8")
    return folder

"""What is here, what is missing, and the command that installs it."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from safecli import __version__
from safecli.config import cache_dir

PACKAGES = ("torch", "transformers", "peft", "accelerate", "sentence-transformers", "faiss-cpu", "datasets", "gguf")


@dataclass(frozen=True)
class Check:
    """One line of `safecli doctor`: `state` is ok, missing or note."""

    state: str
    name: str
    found: str
    remedy: str = ""


def examine() -> list[Check]:
    """Check packages, device, caches and the demo's models."""
    checks = [Check("ok", "safecli", __version__), Check("ok", "python", platform.python_version())]
    for package in PACKAGES:
        try:
            checks.append(Check("ok", package, version(package)))
        except PackageNotFoundError:
            checks.append(Check("missing", package, "not installed", f"pip install {package}"))
    if all(check.state == "ok" for check in checks):
        checks += _device_and_models()
    checks.append(_writable("cache", str(cache_dir())))
    return checks


def _device_and_models() -> list[Check]:
    from safecli.models import (
        DEMO_HUB,
        DEMO_INSTALL,
        DEMO_PACKAGE,
        MINILM_HUB,
        MINILM_INSTALL,
        MINILM_PACKAGE,
        free_memory,
        package_folder,
        pick_device,
    )

    device = pick_device("auto")
    checks = [Check("ok", "device", f"{device}, {free_memory(device) / 2**30:.1f} GiB free")]
    for name, package, fallback, install in (
        ("demo model", DEMO_PACKAGE, f"not installed; the judge downloads {DEMO_HUB} instead", DEMO_INSTALL),
        ("MiniLM", MINILM_PACKAGE, f"not installed; {MINILM_HUB} is downloaded instead", MINILM_INSTALL),
    ):
        folder = package_folder(package)
        checks.append(Check("ok", name, str(folder)) if folder else Check("note", name, fallback, install))
    return checks


def _writable(name: str, folder: str) -> Check:
    existing = folder
    while not os.path.exists(existing):
        existing = os.path.dirname(existing)
    if os.access(existing, os.W_OK):
        return Check("ok", name, folder)
    return Check("missing", name, f"{folder} is not writable", "set SAFECLI_CACHE to a folder of your own")

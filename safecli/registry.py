"""Plugins by entry point: cost backends and judges. Nothing is imported until a plugin is used."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from safecli.config import nearest
from safecli.errors import MissingError, UsageError

COSTS = "safecli.costs"
JUDGES = "safecli.judges"
ALLOWED = "SAFECLI_PLUGINS"


@dataclass(frozen=True)
class Plugin:
    """An entry point as `safecli plugins` lists it."""

    kind: str
    name: str
    package: str
    version: str
    entry: EntryPoint

    @property
    def enabled(self) -> bool:
        """Whether `SAFECLI_PLUGINS`, names of plugins or packages with commas, lets it in; unset, it lets in all."""
        allowed = os.environ.get(ALLOWED)
        return allowed is None or not {self.name, self.package}.isdisjoint(map(str.strip, allowed.split(",")))

    def state(self) -> str:
        """'ok', 'disabled', or 'broken: ' and the reason; imports the plugin unless it is disabled."""
        if not self.enabled:
            return "disabled"
        try:
            self.load()
        except MissingError as error:
            return f"broken: {error.__cause__ or error}"
        return "ok"

    def load(self) -> Any:
        """Import the plugin's class; `MissingError` names the package whose code failed."""
        try:
            loaded = self.entry.load()
        except (Exception, SystemExit) as error:  # a plugin that exits at import is a broken one
            raise MissingError(
                f"plugin '{self.name}' of {self.package} {self.version} is broken: {type(error).__name__}: {error}"
            ) from error
        if not hasattr(loaded, "Options"):
            raise MissingError(f"plugin '{self.name}' of {self.package} {self.version} is broken: no Options class")
        return loaded


def plugins(kind: str | None = None) -> list[Plugin]:
    """All plugins of a kind, or of both, found in the installed packages' metadata."""
    return [
        Plugin(
            group,
            entry.name,
            entry.dist.name if entry.dist else "?",
            entry.dist.version if entry.dist else "?",
            entry,
        )
        for group in (COSTS, JUDGES)
        if kind in (None, group)
        for entry in sorted(entry_points(group=group), key=lambda entry: entry.name)
    ]


def load_plugin(kind: str, name: str) -> Any:
    """The class of the plugin of that name; a clash, an unknown name or a broken plugin is an error."""
    named = [plugin for plugin in plugins(kind) if plugin.name == name]
    noun = kind.removeprefix("safecli.").removesuffix("s")
    if not named:
        raise UsageError(f"no {noun} is called '{name}'{nearest(name, {plugin.name: 0 for plugin in plugins(kind)})}")
    kept = [plugin for plugin in named if plugin.enabled]
    if not kept:
        raise UsageError(f"{noun} '{name}' is left out by {ALLOWED}={os.environ[ALLOWED]}: add it there")
    named = kept
    if len(named) > 1:
        packages = " and ".join(f"{plugin.package} {plugin.version}" for plugin in named)
        raise UsageError(f"{noun} '{name}' is offered by {packages}: uninstall one of them")
    return named[0].load()


def key_values(pairs: Sequence[str], flag: str) -> dict[str, str]:
    """Parse a plugin's `key=value` options as the flag `flag` takes them."""
    parts = [pair.partition("=") for pair in pairs]
    wrong = [key for key, equals, _ in parts if not equals]
    if wrong:
        raise UsageError(f"{flag} {wrong[0]}: write it as key=value")
    return {key.strip(): value.strip() for key, _, value in parts}

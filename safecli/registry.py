"""Plugins by entry point: cost backends and judges. Nothing is imported until a plugin is used."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement

from safecli import __version__
from safecli.config import nearest
from safecli.errors import MissingError, RunError, SafecliError, UsageError

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

    @property
    def made_for(self) -> str:
        """The versions of safecli that the package asks for and this one is not, or ''."""
        for text in (self.entry.dist and self.entry.dist.requires) or []:
            try:
                asked = Requirement(text)
            except InvalidRequirement:
                continue
            applies = asked.name == "safecli" and (asked.marker is None or asked.marker.evaluate({"extra": ""}))
            if applies and not asked.specifier.contains(__version__, prereleases=True):
                return f"safecli{asked.specifier}"
        return ""

    def load(self) -> Any:
        """Import the plugin's class; `MissingError` names the package whose code failed or is for another safecli."""
        if self.made_for:
            raise MissingError(
                f"plugin '{self.name}' of {self.package} {self.version} is made for {self.made_for}, and this is "
                f"safecli {__version__}: pip install --upgrade {self.package}, or install the safecli that it takes"
            )
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
    return _only(kind, name).load()


def _only(kind: str, name: str) -> Plugin:
    named = [plugin for plugin in plugins(kind) if plugin.name == name]
    noun = _noun(kind)
    if not named:
        raise UsageError(f"no {noun} is called '{name}'{nearest(name, {plugin.name: 0 for plugin in plugins(kind)})}")
    kept = [plugin for plugin in named if plugin.enabled]
    if not kept:
        raise UsageError(f"{noun} '{name}' is left out by {ALLOWED}={os.environ[ALLOWED]}: add it there")
    if len(kept) > 1:
        packages = " and ".join(f"{plugin.package} {plugin.version}" for plugin in kept)
        raise UsageError(f"{noun} '{name}' is offered by {packages}: uninstall one of them")
    return kept[0]


def package_of(kind: str, name: str) -> str:
    """The package of the plugin of that name, with its version."""
    plugin = _only(kind, name)
    return f"{plugin.package} {plugin.version}"


def _noun(kind: str) -> str:
    return kind.removeprefix("safecli.").removesuffix("s")


@contextmanager
def running(kind: str, name: str) -> Iterator[None]:
    """Report what a plugin of another package raises as that package's, in a `RunError`.

    A `SafecliError` has its own message and passes, as does whatever safecli's own plugins raise.
    """
    try:
        yield
    except SafecliError:
        raise
    except Exception as error:
        package = package_of(kind, name)
        if package.startswith("safecli "):
            raise
        raise RunError(
            f"{_noun(kind)} '{name}' of {package} failed with {type(error).__name__}: {error}. "
            "That package is not safecli's: --debug shows where it failed, for its authors"
        ) from error


def key_values(pairs: Sequence[str], flag: str) -> dict[str, str]:
    """Parse a plugin's `key=value` options as the flag `flag` takes them."""
    parts = [pair.partition("=") for pair in pairs]
    wrong = [key for key, equals, _ in parts if not equals]
    if wrong:
        raise UsageError(f"{flag} {wrong[0]}: write it as key=value")
    return {key.strip(): value.strip() for key, _, value in parts}

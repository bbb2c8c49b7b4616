"""Suites: named sets of prompts, each one small TOML file, and the published wrappers that attack with any of them."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from safecli.config import Kind, build, nearest
from safecli.errors import InputError, UsageError
from safecli.records import Prompt, read_prompts, read_text, shipped

_DATA = files("safecli").joinpath("data")
SHIPPED = "shipped"
"""The source of the suites whose prompts come with the package."""
RESERVED = ("general_loss", "similarity", "diff", "since", "categories", "ability")
"""What results keep beside the sets, which can't be names of sets."""


class Suite(BaseModel):
    """What a suite's TOML file says."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str = Field(description="What tables and reports call it.")
    kind: Kind = Field(description="What an answer is judged by: toxic, lookalike or harmless.")
    source: str = Field(description="File, datasets id as owner/name[[:config]:split], or shipped.")
    prompt: str | None = Field(None, description="Column that holds the prompt.")
    category: str | None = Field(None, description="Column to break the results down by.")
    where: dict[str, list[str]] = Field({}, description="Columns and the values that a row may have there.")
    wrap: list[str] = Field([], description="Wrappers; every prompt comes once in each.")
    about: str = Field("", description="Where it is from, and its licence.")


def suite_names() -> list[str]:
    """The suites that the package ships."""
    return sorted(entry.name.removesuffix(".toml") for entry in _DATA.joinpath("suites").iterdir())


def read_suite(chosen: str) -> tuple[str, Suite]:
    """The name and content of a suite: NAME, FILE.toml, or either with =SOURCE in place of its own source.

    Errors: `UsageError` (no such suite, with the nearest), `InputError` (a file that is no suite).
    """
    given, _, source = chosen.partition("=")
    if given.endswith(".toml"):
        path = Path(given).expanduser()
        if not path.is_file():
            raise InputError(f"there is no suite {given}")
        name, text = path.stem.replace("-", "_"), read_text(path)
        beside = path.parent
    else:
        if given not in suite_names():
            hint = nearest(given, dict.fromkeys(suite_names()))
            raise UsageError(f"--suite {given}: unknown{hint}; or give a FILE.toml")
        name, text = given, _DATA.joinpath("suites", f"{given}.toml").read_text(encoding="utf-8")
        beside = Path()
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name in RESERVED:
        raise InputError(f"{given}: call the file otherwise (lower-case letters, digits, _; none of {RESERVED})")
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{given}: {error}") from error
    suite = build(Suite, content, given)
    if unknown := [wrapper for wrapper in suite.wrap if wrapper not in wrappers()]:
        raise InputError(f"{given}: no wrapper '{unknown[0]}'{nearest(unknown[0], wrappers())}")
    own = beside / suite.source
    return name, suite.model_copy(update={"source": source or (str(own) if own.is_file() else suite.source)})


def suite_prompts(name: str, suite: Suite, split: str) -> list[Prompt]:
    """The prompts of a suite, in their wrappers; `split` chooses among the shipped ones. Errors as `read_prompts`."""
    if suite.source == SHIPPED:
        prompts = [prompt.model_copy(update={"set": name}) for prompt in shipped(suite.kind, split)]
    else:
        prompts = read_prompts(
            suite.source, suite.kind, suite.prompt, name=name, category=suite.category, only=suite.where
        )
    return [wrapped(prompt, wrapper) for wrapper in suite.wrap for prompt in prompts] if suite.wrap else prompts


@cache
def wrappers() -> dict[str, str]:
    """The published jailbreak templates by name; `{prompt}` is where the prompt goes."""
    found: dict[str, dict[str, str]] = tomllib.loads(_DATA.joinpath("wrappers.toml").read_text(encoding="utf-8"))
    return {name: wrapper["template"] for name, wrapper in found.items()}


def wrapped(prompt: Prompt, wrapper: str) -> Prompt:
    """A prompt in a wrapper, which is its category; a judge still sees what it asks for without it."""
    return prompt.model_copy(
        update={
            "id": f"{prompt.id}-{wrapper}",
            "prompt": wrappers()[wrapper].strip().replace("{prompt}", prompt.prompt),
            "asks": prompt.asks or prompt.prompt,
            "category": wrapper,
        }
    )


def attacked(name: str, prompts: Sequence[Prompt], wrapper: str) -> list[Prompt]:
    """A set of prompts in one wrapper, as a set of its own: NAME_WRAPPER."""
    return [wrapped(prompt, wrapper).model_copy(update={"set": f"{name}_{wrapper}"}) for prompt in prompts]

"""The stages, typed in and typed out, and what they share: reporting progress, and which model a run is about."""

from __future__ import annotations

import logging
from typing import TypeVar

from safecli.artifacts import newest, read_manifest
from safecli.config import ModelOptions

logger = logging.getLogger("safecli")

ModelOptionsT = TypeVar("ModelOptionsT", bound=ModelOptions)

FEW = 20
"""Fewer unsafe answers than this are too few to learn from."""

INHERITED = ("model", "revision", "template", "system", "trust_remote_code")


class Reporter:
    """What a stage tells while it works. This one logs; the command line shows it on the terminal."""

    def say(self, text: str) -> None:
        """Something that happened."""
        logger.info(text)

    def warn(self, text: str) -> None:
        """Something that the user should act on."""
        logger.warning(text)

    def progress(self, what: str, done: int, total: int) -> None:
        """`done` of `total` steps of `what`."""
        logger.debug("%s: %d of %d", what, done, total)


def inherit_model(options: ModelOptionsT, report: Reporter) -> ModelOptionsT:
    """Fill in the model where none is named: the one of the newest records in the run folder, else the demo model."""
    if options.model is not None or getattr(options, "server", None):
        return options
    folder = newest(options.run, "collect")
    if folder is None:
        return options.model_copy(update={"model": "demo"})
    stored = read_manifest(folder / "manifest.json", "collect")["identity"]["options"]
    report.say(f"model: {stored['model']}, as in {folder}")
    return options.model_copy(update={name: stored[name] for name in INHERITED})

"""General ability through lm-evaluation-harness: its tasks, asked of the model that is loaded here."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import yaml

from safecli.errors import InputError, MissingError
from safecli.models import LanguageModel
from safecli.records import read_text

SHIPPED = "basics"
"""The task that comes with the package: 100 multiple-choice questions of our own."""


def right_answers(model: LanguageModel, tasks: Sequence[str], limit: int | None, seed: int) -> dict[str, list[bool]]:
    """For every task whether each of its questions was answered right (`acc`), in order.

    A task is a name that lm_eval knows, the YAML file of one whose data is local, or 'basics'.
    Errors: `MissingError` (no lm_eval), `InputError` (no such task, or one that has no `acc`).
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingError("general ability needs lm_eval: pip install 'safecli[ability]'") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager()
    found: dict[str, list[bool]] = {}
    with as_file(files("safecli").joinpath("data", "ability")) as shipped:
        for name in tasks:
            task = _task(shipped / f"{SHIPPED}.yaml" if name == SHIPPED else name)
            asked = HFLM(pretrained=model.model, tokenizer=model.tokenizer, batch_size=8)
            try:
                samples = lm_eval.simple_evaluate(
                    asked, tasks=[task], limit=limit, task_manager=manager, bootstrap_iters=0, random_seed=seed
                )["samples"]
            except (KeyError, ValueError, FileNotFoundError) as error:
                raise InputError(f"--ability {name}: lm_eval can't ask it: {error}") from error
            for title, rows in samples.items():
                if "acc" not in rows[0]:
                    raise InputError(f"--ability {name}: '{title}' is not scored by accuracy (acc)")
                found[title] = [bool(row["acc"]) for row in sorted(rows, key=lambda row: row["doc_id"])]
    return found


def task_name(chosen: str) -> str:
    """What results call a task: its name, or the name of its file."""
    return Path(chosen).stem if chosen.endswith((".yaml", ".yml")) else chosen


def _task(chosen: str | Path) -> str | dict[str, Any]:
    """A task's name, or what its YAML file says with data files found beside it."""
    path = Path(chosen)
    if path.suffix not in (".yaml", ".yml"):
        return str(chosen)
    if not path.is_file():
        raise InputError(f"--ability {chosen}: there is no such file")
    try:
        config: dict[str, Any] = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:  # a tag that runs code, such as !function, among them
        raise InputError(f"--ability {chosen}: {' '.join(str(error).split())}") from error
    named = config.get("dataset_kwargs", {}).get("data_files", {})
    config["dataset_kwargs"] = {"data_files": {split: str(path.parent / file) for split, file in named.items()}}
    return config

"""Any number of evaluations on one page: every model beside its own base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safecli.artifacts import FORMAT, fingerprint, newest, read_json
from safecli.errors import InputError, UsageError
from safecli.report import write_report
from safecli.stages.evaluate import Evaluated, training_metrics, written_answers


def compare(runs: Sequence[Path], out: Path) -> Evaluated:
    """Merge the newest evaluations of run folders into one report at `out`; nothing is generated or judged again.

    A base that was measured in the same way, on the same prompts, comes once; other models are RUN: NAME.
    Errors: `InputError` (a folder without an evaluation), `UsageError` (two runs of one name).
    """
    if len({run.name for run in runs}) < len(runs):
        raise UsageError(f"runs need names of their own, got {', '.join(run.name for run in runs)}: rename the folders")
    models: dict[str, Any] = {}
    sets: dict[str, Any] = {}
    answers: list[dict[str, Any]] = []
    metrics: list[dict[str, Any]] = []
    known: set[str] = set()
    first: dict[str, Any] = {}
    for run in runs:
        folder = newest(run, "eval")
        if folder is None:
            raise InputError(f"{run} holds no finished evaluation: run safecli eval --run {run}")
        found = read_json(folder / "results.json")
        first = first or found
        marks = {name: mark for name, mark in found["fingerprints"].items() if name != "adapters"}
        base = fingerprint(marks, found["options"])
        names = {name: f"{run.name}: {name}" for name in found["models"]}
        if base in known:
            del names["base"]
        elif not known:
            names["base"] = "base"
        known.add(base)
        models |= {shown: found["models"][name] for name, shown in names.items()}
        sets |= found["sets"]
        answers += [{**row, "model": names[row["model"]]} for row in written_answers(folder, list(names))]
        metrics += training_metrics(run)
    results = {
        **{key: first[key] for key in ("safecli", "created", "seed", "model")},
        "format": FORMAT,
        "options": {run.name: str(run) for run in runs},
        "sets": sets,
        "models": models,
        "gates": [],
    }
    write_report(results, answers, metrics, out)
    return Evaluated(results, answers, out, out, [])

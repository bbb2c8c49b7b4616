"""The terminal: progress, tables, JSON, and errors as one or two lines with an exit code."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from safecli.judges import SUMS
from safecli.stages import Reporter

CONTROL = {code: "�" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def plain(text: str) -> str:
    """Text of a model or a user's file, made safe to print: no markup, no terminal control sequences."""
    return escape(text.translate(CONTROL))


class TerminalReporter(Reporter):
    """Says what happens on stderr: bars on a terminal, plain lines in CI, nothing but warnings when quiet."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.console = Console(stderr=True, soft_wrap=True, highlight=False)
        self.bars = self.console.is_terminal and not os.environ.get("CI") and not quiet
        self.live: Progress | None = None
        self.tasks: dict[str, Any] = {}
        self.told: dict[str, int] = {}

    def say(self, text: str) -> None:
        """A dim line."""
        if not self.quiet:
            self.console.print(plain(text), style="dim")

    def warn(self, text: str) -> None:
        """A yellow line, also when quiet."""
        self.console.print(f"[yellow]warning:[/] {plain(text)}")

    def progress(self, what: str, done: int, total: int) -> None:
        """Move the bar of `what`, or print a line at every tenth."""
        if self.bars:
            self._bar(what, done, total)
        elif not self.quiet and done * 10 // total > self.told.get(what, -1):
            self.told[what] = -1 if done == total else done * 10 // total
            self.console.print(f"{plain(what)}: {done} of {total}")

    def _bar(self, what: str, done: int, total: int) -> None:
        if self.live is None:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.live = Progress(*columns, console=self.console, transient=True)
            self.live.start()
        if what not in self.tasks:
            self.tasks[what] = self.live.add_task(plain(what), total=total)
        self.live.update(self.tasks[what], completed=done)
        if done == total:
            self.close()

    def close(self) -> None:
        """Take the bars off the terminal."""
        if self.live is not None:
            self.live.stop()
            self.live, self.tasks = None, {}


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def print_pairs(title: str, pairs: Mapping[str, Any]) -> None:
    """A two-column table on stdout."""
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in pairs.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{key} {count}" for key, count in value.items())
        elif isinstance(value, list):
            value = "\n".join(map(str, value[:10])) + (f"\n… {len(value) - 10} more" if len(value) > 10 else "")
        table.add_row(plain(name.replace("_", " ")), plain(str(value)))
    Console(highlight=False).print(table)


def print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    """Rows of the same names as a table on stdout, numbers to four digits."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    shown = [[_short(row.get(name)) for name in names] for row in rows]
    print_table(title, [name.replace("_", " ") for name in names], shown)


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_short, value))
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table on stdout."""
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*map(plain, row))
    Console(highlight=False).print(table)


def print_results(results: dict[str, Any], answers: list[dict[str, Any]]) -> None:
    """Base beside the other models: outcomes by set, general loss, and three prompts with all answers."""
    models: dict[str, Any] = results["models"]
    tested = [name for name, model in models.items() if "diff" in model]
    rows = []
    for part in results["sets"]:
        for label in models["base"].get(part, {}):
            cells = [_cell(model[part][label]) if part in model else "" for model in models.values()]
            title = f"{part} {label}".replace("_", " ")
            rows.append([title, *cells, *(f"{models[name]['diff'][part][label]['p']:.2g}" for name in tested)])
    for task in models["base"].get("ability", {}):
        cells = [_cell(model["ability"][task]) for model in models.values()]
        rows.append(
            [f"right: {task}", *cells, *(f"{models[name]['diff']['ability'][task]['p']:.2g}" for name in tested)]
        )
    for name, digits in (("general_loss", 3), ("similarity", 2)):
        values = [models[model][name] for model in models]
        rows.append([name.replace("_", " "), *("" if v is None else f"{v:.{digits}f}" for v in values)])
    rows = [row + [""] * (1 + len(models) + len(tested) - len(row)) for row in rows]
    print_table("Outcomes (95 % Wilson intervals, McNemar's p)", ["", *models, *("p" for _ in tested)], rows)
    examples = _one_of_each(answers, list(models), list(results["sets"]))
    print_table("A prompt of each set", ["prompt", *models], examples)
    for gate in results["gates"]:
        verdict = "FAILED" if gate["failed"] else "holds"
        print_pairs(f"gate {gate['expression']}", {gate["model"]: f"{gate['value']:.3g} {verdict}"})


def print_calibration(found: Mapping[str, Any]) -> None:
    """A judge against human labels: figures, by group, the confusion, and reliability as bars."""
    figures = ("n", "positives", "accuracy", "balanced_accuracy", "precision", "recall", "f1", "kappa")
    whole = {name: _number(found[name]) for name in (*figures, "brier") if name in found}
    whole |= {f"all outcomes: {name}": _number(value) for name, value in found.get("outcomes", {}).items()}
    positive, counted = ", ".join(found["positive"]), ", ".join(found["outcomes_counted"])
    print_pairs(f"{found['judge']} against '{found['labels']}': {positive} (judged {counted})", whole)
    if "groups" in found:
        rows = [[name, *(_number(group[key]) for key in figures)] for name, group in found["groups"].items()]
        print_table("by group", ["", *figures], rows)
    confusion: Mapping[str, Mapping[str, int]] = found["confusion"]
    judged = list(next(iter(confusion.values())))
    print_table(
        "labels, and what was judged",
        ["label", *judged],
        [[label, *(str(row[name]) for name in judged)] for label, row in confusion.items()],
    )
    rows = [
        [f"{b['predicted']:.2f}", f"{b['observed']:.2f} [{b['low']:.2f}, {b['high']:.2f}]", str(b["n"]), _bar(b)]
        for b in found.get("reliability", [])
    ]
    if rows:
        print_table("reliability: | is predicted, # observed", ["predicted", "observed", "n", ""], rows)


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def _bar(found: Mapping[str, float], width: int = 20) -> str:
    """The observed rate as a row of #, with a mark where the prediction is."""
    bar = list(("#" * round(found["observed"] * width)).ljust(width + 1))
    bar[round(found["predicted"] * width)] = "|"
    return "".join(bar).rstrip()


def _one_of_each(answers: list[dict[str, Any]], models: list[str], sets: list[str]) -> list[list[str]]:
    """One prompt of each set with every model's answer; on a toxic one the outcome changed, if it did on any."""
    prompts: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in answers:
        prompts.setdefault((row["set"], row["id"]), {})[row["model"]] = row
    rows = []
    for part in sets:
        found = [by_model for (set_, _), by_model in prompts.items() if set_ == part]
        changed = [by for by in found if _unsafe(by["base"]) and not _unsafe(by[models[-1]])]
        for by_model in (changed or found)[:1]:
            cells = [f"{by_model[name]['answer']}\n({by_model[name]['outcome']})" for name in models]
            rows.append([by_model["base"]["prompt"], *cells])
    return rows


def _unsafe(row: dict[str, Any]) -> bool:
    return row["outcome"] in SUMS["unsafe"]


def _cell(found: dict[str, float]) -> str:
    return f"{found['count']}/{found['n']}  {found['rate']:.0%} [{found['low']:.0%}, {found['high']:.0%}]"

"""Gates: bounds on any number of an evaluation's results, parsed by name, and regressions against an earlier one."""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safecli.config import Kind, nearest
from safecli.errors import InputError, UsageError
from safecli.judges import decides
from safecli.records import read_text
from safecli.stages import Reporter
from safecli.stages.summary import SHIPPED_SETS, labels_of
from safecli.stats import difference

NUMBERS = ("rate", "low", "high", "count", "n")
DIFFERENCES = ("value", "low", "high", "p")
SCALARS = ("general_loss", "similarity")
COMPARISONS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}


@dataclass(frozen=True)
class Gate:
    """A bound on one number of a model, such as `toxic.unsafe.high > 0.2`: it fails where that is true."""

    expression: str
    path: tuple[str, ...]
    comparison: str
    limit: float

    def value(self, model: dict[str, Any]) -> float:
        """The number that the gate looks at in one model's results."""
        found: Any = model
        for name in self.path:
            if not isinstance(found, dict) or name not in found:
                raise UsageError(f"--fail-if '{self.expression}': this evaluation has no {'.'.join(self.path)}")
            found = found[name]
        if not isinstance(found, (int, float)):
            raise UsageError(f"--fail-if '{self.expression}': '{'.'.join(self.path)}' is not a number")
        return float(found)

    def fails(self, model: dict[str, Any]) -> bool:
        """Whether the expression is true of this model."""
        return bool(COMPARISONS[self.comparison](self.value(model), self.limit))


def parse_gate(expression: str, sets: Mapping[str, Kind] = SHIPPED_SETS, tasks: Sequence[str] = ()) -> Gate:
    """Read `set.outcome[.low|.high|.diff[.low|.high|.p]|.since[.low|.high]] > number`; `UsageError` shows the form."""
    match = re.fullmatch(r"\s*([a-z0-9_]+(?:\.[a-z_]+)*)\s*(>=|<=|>|<)\s*(-?\d+(?:\.\d+)?)\s*", expression)
    if match is None:
        raise UsageError(f"--fail-if '{expression}': write it as 'toxic.unsafe > 0.2'")
    paths = _gate_paths(sets, tasks)
    if match[1] not in paths:
        raise UsageError(f"--fail-if '{expression}': unknown '{match[1]}'{nearest(match[1], paths)}")
    return Gate(expression, paths[match[1]], match[2], float(match[3]))


def _gate_paths(sets: Mapping[str, Kind], tasks: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Every name that a gate may use, with where the results of a model hold it."""
    rates = [(name, label) for name, kind in sets.items() for label in labels_of(kind)]
    rates += [("ability", task) for task in tasks]
    paths: dict[str, tuple[str, ...]] = {name: (name,) for name in SCALARS}
    paths["general_loss.diff"] = ("diff", "general_loss")
    for name, kind in sets.items():
        paths[f"{name}.{decides(kind)}.diff.p_holm"] = ("diff", name, decides(kind), "p_holm")
    for rate_path in rates:
        name = ".".join(rate_path)
        paths[name], paths[f"{name}.diff"] = (*rate_path, "rate"), ("diff", *rate_path, "value")
        paths |= {f"{name}.{number}": (*rate_path, number) for number in NUMBERS}
        paths[f"{name}.any"], paths[f"{name}.corrected"] = (
            (*rate_path, "any", "value"),
            (*rate_path, "corrected", "value"),
        )
        paths |= {
            f"{name}.{one}.{end}": (*rate_path, one, end) for one in ("any", "corrected") for end in ("low", "high")
        }
        paths |= {f"{name}.diff.{number}": ("diff", *rate_path, number) for number in DIFFERENCES}
        paths[f"{name}.since"] = ("since", *rate_path, "value")
        paths |= {f"{name}.since.{number}": ("since", *rate_path, number) for number in ("low", "high")}
    return paths


def read_baseline(path: Path) -> dict[str, Any]:
    """The results of an earlier evaluation."""
    try:
        found: dict[str, Any] = json.loads(read_text(path))
        if not isinstance(found["models"], dict):
            raise TypeError
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"--baseline {path} is not the results.json of an evaluation") from error
    return found


def regressions(sets: Mapping[str, Kind], before: Mapping[str, Any]) -> list[str]:
    """Gates that fail where more is unsafe, or less is helpful, than before, beyond the 95 % interval."""
    known = {name for model in before["models"].values() for name in model}
    if not known & set(sets):
        raise UsageError(f"--baseline: it has none of the sets {', '.join(sets)}")
    return [
        f"{name}.{decides(kind)}.since." + ("low > 0" if kind == "toxic" else "high < 0")
        for name, kind in sets.items()
        if name in known
    ]


def compare_with(results: dict[str, Any], before: Mapping[str, Any], report: Reporter) -> None:
    """Put into every model `since`: its rates less those that a model of its name had before."""
    if results["fingerprints"]["prompts"] != before.get("fingerprints", {}).get("prompts"):
        report.warn("the baseline was measured on other prompts")
    for name, model in results["models"].items():
        old = before["models"].get(name)
        if old is None:
            raise UsageError(f"--baseline: it has no model '{name}' (it has {', '.join(before['models'])})")
        model["since"] = {
            part: {
                label: asdict(difference(new["count"], new["n"], was["count"], was["n"]))
                for label, new in model[part].items()
                if (was := old[part].get(label))
            }
            for part in results["sets"]
            if part in model and part in old
        }

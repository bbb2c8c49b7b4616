"""Judge answers that came from anywhere, by one judge or a panel, and hold a judge against people's labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from safecli.config import CalibrateOptions, JudgeOptions, nearest
from safecli.errors import InputError, UsageError
from safecli.judges import HARMLESS_OUTCOMES, SUMS, TOXIC_OUTCOMES, Judge, Pair, Verdict
from safecli.records import SETS, Row, read_rows, write_rows
from safecli.report.review import ReviewServer
from safecli.stages import Reporter
from safecli.stages.answers import load_judge
from safecli.stats import kappa, krippendorff, wilson

CHUNK = 128
BINS = 10
KNOWN = tuple(dict.fromkeys((*TOXIC_OUTCOMES, *HARMLESS_OUTCOMES)))


@dataclass(frozen=True)
class Judged:
    """What `judge` made: the file, how often each judge found each outcome, what it took, how far a panel agrees."""

    path: Path
    rows: int
    outcomes: dict[str, dict[str, int]]
    agreement: float | None
    disagreed: int
    usage: dict[str, dict[str, float]]


def judge_file(file: Path, out: Path, options: JudgeOptions, report: Reporter | None = None) -> Judged:
    """Judge every row of `file` and write it with its own columns and `outcome`, `score`, `reasons` to `out`.

    A panel gives the outcome that most of its judges found (of the first of them in a tie), the mean score, all
    reasons, `outcome_NAME` of each, and `agreed`. Errors: `InputError` (rows), `UsageError` (judge, no `out`).
    """
    report = report or Reporter()
    names = _names(options)
    rows = read_rows(file, options.prompt_column, options.answer_column)
    pairs = [_pair(row, options) for row in rows]
    judges = {name: load_judge(name, _own(options.judge_opt, name, names)) for name in names}
    verdicts = {name: _all_verdicts(judge, name, pairs, report) for name, judge in judges.items()}
    write_rows(out, [row.columns | _columns(verdicts, index) for index, row in enumerate(rows)])
    found = [[verdict.outcome for verdict in verdicts[name]] for name in names]
    return Judged(
        path=out,
        rows=len(rows),
        outcomes={name: dict(Counter(outcomes)) for name, outcomes in zip(names, found, strict=True)},
        agreement=krippendorff(found) if len(names) > 1 else None,
        usage={name: asdict(used) for name, judge in judges.items() if (used := getattr(judge, "usage", None))},
        disagreed=sum(len(set(outcomes)) > 1 for outcomes in zip(*found, strict=True)),
    )


def _names(options: JudgeOptions) -> list[str]:
    names = [name.strip() for name in options.judge.split(",")]
    if len(set(names)) < len(names):
        raise UsageError(f"--judge {options.judge}: a panel names every judge once")
    return names


def _own(chosen: Sequence[str], name: str, names: Sequence[str]) -> list[str]:
    """The options of one judge: all of them where it is alone, those that begin with its name in a panel."""
    if strays := [pair for pair in chosen if len(names) > 1 and pair.partition(".")[0] not in names]:
        raise UsageError(f"--judge-opt {strays[0]}: in a panel write it as NAME.key=value")
    return [pair for pair in chosen if len(names) == 1 or pair.startswith(f"{name}.")]


def _pair(row: Row, options: JudgeOptions) -> Pair:
    kind = row.columns.get("kind") or options.kind
    if kind not in SETS:
        raise InputError(f"{row.where}: kind '{kind}' is none of {', '.join(SETS)}{nearest(kind, dict.fromkeys(SETS))}")
    return Pair(row.prompt, row.answer, kind)


def _all_verdicts(judge: Judge, name: str, pairs: Sequence[Pair], report: Reporter) -> list[Verdict]:
    verdicts: list[Verdict] = []
    for start in range(0, len(pairs), CHUNK):
        verdicts += judge.judge(pairs[start : start + CHUNK])
        report.progress(f"judge {name}", len(verdicts), len(pairs))
    return verdicts


def _columns(verdicts: dict[str, list[Verdict]], index: int) -> dict[str, Any]:
    found = {name: rows[index] for name, rows in verdicts.items()}
    (outcome, votes), *_ = Counter(verdict.outcome for verdict in found.values()).most_common()
    columns = {
        "outcome": outcome,
        "score": round(sum(verdict.score for verdict in found.values()) / len(found), 4),
        "reasons": [reason for verdict in found.values() for reason in verdict.reasons],
    }
    if len(found) == 1:
        return columns
    each = {f"outcome_{name}": verdict.outcome for name, verdict in found.items()}
    return columns | each | {"agreed": votes == len(found)}


def review_server(file: Path, labels: Path, options: JudgeOptions, port: int) -> ReviewServer:
    """A server for labelling the rows of `file` by hand into `labels`; after a panel, those it disagreed on alone."""
    rows = read_rows(file, options.prompt_column, options.answer_column)
    split = [row for row in rows if str(row.columns.get("agreed")) == "False"]
    return ReviewServer([(row, _pair(row, options).kind) for row in split or rows], labels, port)


def calibrate(file: Path, options: CalibrateOptions, report: Reporter | None = None) -> dict[str, Any]:
    """Hold one judge against the labels of people: agreement on positive or negative, by group, and calibration.

    Returns n, positives, accuracy, balanced_accuracy, precision, recall, f1, kappa, the confusion counts, `groups`;
    where harm is what is positive, brier and `reliability` (bins of the score: mean predicted, rate observed with its
    95 % interval, n); where the labels are outcomes, `outcomes` (accuracy and kappa over all).
    """
    report = report or Reporter()
    (name, *others) = _names(options)
    if others:
        raise UsageError("calibrate one judge at a time")
    rows = read_rows(file, options.prompt_column, options.answer_column)
    labels = [_label(row, options.labels) for row in rows]
    positive = _positive(options, labels)
    judge = load_judge(name, options.judge_opt)
    wanted = _wanted(options, positive, judge, name)
    verdicts = _all_verdicts(judge, name, [_pair(row, options) for row in rows], report)
    truth = np.array([label in positive for label in labels])
    outcomes = [verdict.outcome for verdict in verdicts]
    called = np.array([outcome in wanted for outcome in outcomes])
    found: dict[str, Any] = {"judge": name, "labels": options.labels, "positive": positive, "outcomes_counted": wanted}
    found |= _agreement(truth, called)
    found["confusion"] = _confusion(labels, outcomes)
    if set(wanted) <= set(SUMS["unsafe"]):
        chance = np.array([verdict.score for verdict in verdicts])
        found |= {"brier": float(np.mean((chance - truth) ** 2)), "reliability": _reliability(truth, chance)}
    if set(labels) <= set(KNOWN):
        right = sum(label == outcome for label, outcome in zip(labels, outcomes, strict=True))
        found["outcomes"] = {"accuracy": right / len(labels), "kappa": kappa(labels, outcomes)}
    if options.group:
        groups = [str(row.columns.get(options.group, "")) for row in rows]
        found["groups"] = {
            group: _agreement(*(side[[one == group for one in groups]] for side in (truth, called)))
            for group in dict.fromkeys(groups)
        }
    return found


def _label(row: Row, column: str) -> str:
    if column not in row.columns:
        raise InputError(f"{row.where}: no column '{column}'{nearest(column, row.columns)}: use --labels NAME")
    return str(row.columns[column]).strip()


def _positive(options: CalibrateOptions, labels: Sequence[str]) -> list[str]:
    positive = [label.strip() for label in options.positive.split(",")]
    if not set(positive) & set(labels):
        seen = ", ".join(sorted(set(labels))[:12])
        raise UsageError(
            f"--positive {options.positive}: no row has such a label in '{options.labels}' (it has {seen})"
        )
    return positive


def _wanted(options: CalibrateOptions, positive: Sequence[str], judge: Judge, name: str) -> list[str]:
    if options.outcomes:
        wanted = [outcome.strip() for outcome in options.outcomes.split(",")]
        if unknown := [outcome for outcome in wanted if outcome not in KNOWN]:
            raise UsageError(f"--outcomes: unknown '{unknown[0]}'{nearest(unknown[0], dict.fromkeys(KNOWN))}")
        return wanted
    return list(positive) if set(positive) <= set(KNOWN) else list(judge.looks_for)


def _agreement(truth: np.ndarray, called: np.ndarray) -> dict[str, Any]:
    """How a judge's calls [N] agree with the truth [N], as a dictionary of plain numbers."""
    counts = Counter(zip(truth.tolist(), called.tolist(), strict=True))
    tp, fp, fn, tn = (counts[pair] for pair in ((True, True), (False, True), (True, False), (False, False)))
    return {
        "n": len(truth),
        "positives": tp + fn,
        "accuracy": (tp + tn) / max(len(truth), 1),
        "balanced_accuracy": (tp / max(tp + fn, 1) + tn / max(tn + fp, 1)) / 2,
        "precision": tp / max(tp + fp, 1),
        "recall": tp / max(tp + fn, 1),
        "f1": 2 * tp / max(2 * tp + fp + fn, 1),
        "kappa": kappa(truth.tolist(), called.tolist()),
        "counts": {"true_positive": tp, "false_positive": fp, "false_negative": fn, "true_negative": tn},
    }


def _reliability(truth: np.ndarray, chance: np.ndarray) -> list[dict[str, float]]:
    bins = np.minimum((chance * BINS).astype(int), BINS - 1)
    rows = []
    for number in sorted(set(bins.tolist())):
        inside = bins == number
        count, n = int(truth[inside].sum()), int(inside.sum())
        low, high = wilson(count, n)
        rows.append(
            {"predicted": float(chance[inside].mean()), "observed": count / n, "low": low, "high": high, "n": n}
        )
    return rows


def _confusion(labels: Sequence[str], outcomes: Sequence[str]) -> dict[str, dict[str, int]]:
    counts = Counter(zip(labels, outcomes, strict=True))
    seen = [outcome for outcome in KNOWN if outcome in outcomes]
    return {label: {outcome: counts[label, outcome] for outcome in seen} for label in sorted(set(labels))}

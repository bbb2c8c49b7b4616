"""Base beside adapters on toxic, look-alike and harmless prompts: outcomes, paired tests, general loss, gates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from safecli import __version__
from safecli.artifacts import FORMAT, Stage, atomic, file_fingerprint, newest, open_stage, read_json, write_json
from safecli.config import EvalOptions, Kind, nearest
from safecli.errors import UsageError
from safecli.judges import SUMS
from safecli.losses import linear_cross_entropy
from safecli.models import (
    LanguageModel,
    attach_adapter,
    last_hidden,
    load_model,
)
from safecli.records import Prompt, Response, prompts_fingerprint, read_responses
from safecli.report import markdown_summary, write_junit, write_report
from safecli.stages import Reporter, inherit_model
from safecli.stages.ability import right_answers, task_name
from safecli.stages.answers import Job, answer_all, checked, judge_identity, load_judge
from safecli.stages.batches import Rows, output_head
from safecli.stages.engines import Engine, Local, Served, adapter_identity, model_identity
from safecli.stages.gates import Gate, compare_with, parse_gate, read_baseline, regressions
from safecli.stages.summary import SHIPPED_SETS, add_ability, add_over_seeds, judge_errors, summarise, take_out_errors
from safecli.stages.train import read_metrics
from safecli.suites import SHIPPED, attacked, read_suite, suite_prompts, wrappers

LOSS_BATCH = 16


@dataclass(frozen=True)
class Evaluated:
    """What `eval` found: the content of `results.json`, the report, and the gates that failed."""

    results: dict[str, Any]
    answers: list[dict[str, Any]]
    results_path: Path
    report_path: Path
    failed: list[str]


def evaluate(options: EvalOptions, report: Reporter | None = None) -> Evaluated:
    """Compare adapters with the base; `results.json`, `report.html`, `summary.md`, `junit.xml` go to the run folder.

    Errors: `InputError` (prompts, adapter of another base), `MissingError`, `UsageError` (gate), `RunError`.
    """
    report = report or Reporter()
    plan = _plan(options, report)
    options, stage = plan.options, plan.stage
    with open_stage(stage):
        if stage.done:
            report.say(f"already evaluated: {stage.path}")
        else:
            _evaluate(options, plan.sets, plan.prompts, plan.adapters, stage, report)
        results = read_json(stage.path / "results.json")
        results["report"] = str(options.run / "report.html")
        results["adapters"] = {name: str(path) for name, path in plan.adapters.items()}
        if plan.baseline:
            compare_with(results, plan.baseline, report)
        results["gates"] = [
            {"expression": gate.expression, "model": name, "value": gate.value(model), "failed": gate.fails(model)}
            for gate in plan.gates
            for name, model in results["models"].items()
            if name != "base"
        ]
        answers = _publish(options, results, stage)
    failed = [
        f"{gate['model']}: {gate['expression']} ({gate['value']:.3g})" for gate in results["gates"] if gate["failed"]
    ]
    return Evaluated(results, answers, options.run / "results.json", options.run / "report.html", failed)


def preview(options: EvalOptions, report: Reporter) -> dict[str, Any]:
    """What `eval` would do: its folder, whether it is done, models and prompts of each set."""
    plan = _plan(options, report)
    counts = dict(Counter(prompt.set for prompt in plan.prompts))
    models = ["base", *plan.adapters]
    return {"folder": str(plan.stage.path), "done": plan.stage.done, "models": models, "prompts": counts}


@dataclass(frozen=True)
class _Plan:
    """What the options ask for, and where its answers go."""

    options: EvalOptions
    sets: dict[str, PromptSet]
    prompts: list[Prompt]
    baseline: dict[str, Any] | None
    gates: list[Gate]
    adapters: dict[str, Path]
    stage: Stage


def _plan(options: EvalOptions, report: Reporter) -> _Plan:
    """What `eval` would do, checked as far as it can be before a model is loaded."""
    if options.server and (options.prefill or options.ability):
        raise UsageError("--prefill and --ability need a model loaded here: leave them, or --server, out")
    if options.over_seeds and len(options.adapter) < 2:
        raise UsageError("--over-seeds: give the --adapter of every seed, two at least")
    if options.samples > 1 and options.temperature == 0:
        raise UsageError("--samples: several greedy answers are all the same: give a --temperature too")
    sets, prompts = _sets(options, report)
    baseline = read_baseline(options.baseline) if options.baseline else None
    expressions = [*options.fail_if, *(regressions(_kinds(sets), baseline) if baseline else ())]
    gates = _gates(expressions, options, sets)
    options = inherit_model(options, report)
    adapters = _adapters(options, report)
    stage = Stage(options.run, "eval", _identity(options, prompts, adapters))
    return _Plan(options, sets, prompts, baseline, gates, adapters, stage)


def _adapters(options: EvalOptions, report: Reporter) -> dict[str, Path]:
    if not options.adapter and options.server:
        return {}
    if not options.adapter:
        folder = newest(options.run, "train")
        if folder is None:
            report.say("no adapter in the run folder: the base model alone")
            return {}
        report.say(f"adapter: {folder / 'adapter'}, the newest of the run folder")
        return {"tuned": folder / "adapter"}
    if len(options.adapter) == 1:
        return {"tuned": options.adapter[0]}
    names = [path.name if path.name != "adapter" else path.parent.name for path in options.adapter]
    if len({*names, "base"}) <= len(names):
        raise UsageError(f"adapters need names of their own, got {', '.join(names)}: rename the folders")
    return dict(zip(names, options.adapter, strict=True))


@dataclass(frozen=True)
class PromptSet:
    """A set of prompts as the results name it: what it is called, and what its answers are judged by."""

    title: str
    kind: Kind


def _kinds(sets: Mapping[str, PromptSet]) -> dict[str, Kind]:
    return {name: one.kind for name, one in sets.items()}


def _gates(expressions: Sequence[str], options: EvalOptions, sets: Mapping[str, PromptSet]) -> list[Gate]:
    tasks = [task_name(task) for task in options.ability]
    return [parse_gate(expression, _kinds(sets), tasks) for expression in expressions]


def _sets(options: EvalOptions, report: Reporter) -> tuple[dict[str, PromptSet], list[Prompt]]:
    """The sets to measure on by name, those that attacks make of them among them, and their prompts."""
    if unknown := [wrapper for wrapper in options.wrap if wrapper not in wrappers()]:
        raise UsageError(f"--wrap {unknown[0]}: unknown{nearest(unknown[0], wrappers())}")
    suites = dict(read_suite(chosen) for chosen in options.suite)
    for kind in SHIPPED_SETS:
        source = getattr(options, kind) or ("none" if options.suite else SHIPPED)
        if source != "none":
            changed = {"source": source, "prompt": options.prompt_column}
            suites[kind] = read_suite(kind)[1].model_copy(update=changed)
    if SHIPPED in {suite.source for suite in suites.values()}:
        report.say(f"prompts: the shipped ones, {options.split} split")
    sets = {name: PromptSet(suite.title, suite.kind) for name, suite in suites.items()}
    prompts: list[Prompt] = []
    for name, suite in suites.items():
        found = suite_prompts(name, suite, options.split)[: options.limit]
        prompts += found
        for wrapper in options.wrap if suite.kind == "toxic" and not suite.wrap else ():
            sets[f"{name}_{wrapper}"] = PromptSet(f"{suite.title}, {wrapper.replace('_', ' ')}", "toxic")
            prompts += attacked(name, found, wrapper)
    toxic = {name: one for name, one in sets.items() if one.kind == "toxic"}
    for k in options.prefill:
        for name, one in toxic.items():
            sets[f"{name}_prefill_{k}"] = PromptSet(f"{one.title}, {k} tokens given", "toxic")
    return sets, prompts


def _identity(options: EvalOptions, prompts: list[Prompt], adapters: dict[str, Path]) -> dict[str, Any]:
    skip = {"run", "batch_size", "adapter", "fail_if", "baseline", "toxic", "lookalike", "harmless", "suite", "wrap"}
    return {
        "options": options.model_dump(mode="json", exclude=skip),
        "prompts": prompts_fingerprint(prompts),
        "model": model_identity(options),
        "judge": judge_identity(options.judge, options.judge_opt),
        "adapters": {name: adapter_identity(options, path) for name, path in adapters.items()},
        "labels": file_fingerprint(options.labels) if options.labels else None,
    }


def _evaluate(
    options: EvalOptions,
    sets: dict[str, PromptSet],
    prompts: list[Prompt],
    adapters: dict[str, Path],
    stage: Stage,
    report: Reporter,
) -> None:
    judge = load_judge(options.judge, options.judge_opt)
    model = None if options.server else load_model(options)
    for adapter in adapters.values() if model else ():
        with _engine(options, model, adapter, report):
            report.say(f"{adapter} fits the model")
    kept: list[Prompt] = []
    answers: dict[str, list[Response]] = {}
    losses: dict[str, float | None] = {}
    right: dict[str, dict[str, list[bool]]] = {}
    for name in ("base", *adapters):
        with _engine(options, model, adapters.get(name), report) as engine:
            kept = kept or checked(prompts, engine, options, report)[0]
            jobs = [Job(prompt, sample, options.temperature) for prompt in kept for sample in range(options.samples)]
            report.say(f"answering {len(jobs)} prompts with {name}")
            answers[name], _ = answer_all(jobs, stage.path / f"answers-{name}.jsonl", engine, judge, options, report)
            losses[name] = general_loss(model, answers["base"], options.max_prompt_tokens) if model else None
            right[name] = _ability(options, model, stage.path / f"ability-{name}.json", report) if model else {}
            given = _given(options.prefill, answers["base"], kept, model) if model else []
            if given:
                report.say(f"going on from {len(given)} openings of unsafe answers with {name}")
                file = stage.path / f"prefilled-{name}.jsonl"
                answers[name] = [*answers[name], *answer_all(given, file, engine, judge, options, report)[0]]
    kinds = _kinds(sets)
    results = {
        "format": FORMAT,
        "safecli": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": options.seed,
        "model": options.model,
        "options": stage.identity["options"],
        "fingerprints": {name: stage.identity[name] for name in ("prompts", "model", "judge", "adapters")},
        "sets": {name: asdict(one) for name, one in sets.items()},
        "models": summarise(answers, losses, kinds),
        "gates": [],
    }
    add_ability(results["models"], right)
    if options.over_seeds:
        add_over_seeds(results["models"], answers, kinds)
    if options.labels:
        errors = judge_errors(options.labels, judge, options.prompt_column)
        take_out_errors(results["models"], kinds, errors)
    write_json(stage.path / "results.json", results)
    stage.finish({"models": list(answers)})


def _ability(options: EvalOptions, model: LanguageModel, path: Path, report: Reporter) -> dict[str, list[bool]]:
    """What `right_answers` finds, kept so that a killed evaluation does not ask again."""
    if options.ability and not path.exists():
        report.say(f"asking {', '.join(options.ability)}")
        write_json(path, right_answers(model, options.ability, options.limit, options.seed))
    return read_json(path) if options.ability else {}


def _given(
    lengths: Sequence[int], base: Sequence[Response], prompts: Sequence[Prompt], model: LanguageModel
) -> list[Job]:
    """The shallow-alignment attack (Qi et al. 2025, arXiv 2406.05946): answers that begin with the first tokens of the
    base's own unsafe answer, for every length; as sets of their own."""
    unsafe = {r.id: r for r in reversed(base) if r.outcome in SUMS["unsafe"] and "_prefill_" not in r.set}
    return [
        Job(
            prompt.model_copy(update={"id": f"{prompt.id}-{k}", "set": f"{prompt.set}_prefill_{k}"}),
            opening=tuple(model.answer_ids(unsafe[prompt.id].answer)[:k]),
        )
        for k in lengths
        for prompt in prompts
        if prompt.id in unsafe
    ]


@contextmanager
def _engine(
    options: EvalOptions, model: LanguageModel | None, adapter: Path | None, report: Reporter
) -> Iterator[Engine]:
    """What answers for the base or for an adapter: the one loaded base, which wears it for a while, or the server."""
    if model is None:
        yield Served(options, str(adapter or options.model))
    elif adapter is None:
        yield Local(model, report.warn)
    else:
        worn = model.model = attach_adapter(model.model, adapter)
        try:
            yield Local(model, report.warn)
        finally:
            model.model = worn.unload()


@torch.inference_mode()
def general_loss(model: LanguageModel, base_answers: Sequence[Response], longest: int) -> float | None:
    """Cross-entropy per token, in nats, of the base's own fluent answers to harmless prompts; None without any."""
    texts = [r for r in base_answers if r.kind != "toxic" and r.answer and r.outcome != "degenerate"]
    total, tokens = 0.0, 0
    for start in range(0, len(texts), LOSS_BATCH):
        rows, targets = Rows(), []
        for r in texts[start : start + LOSS_BATCH]:
            answer = model.answer_ids(r.answer)[:longest]
            rows.add(model.prompt_ids(r.prompt), answer)
            targets += answer
        ids, mask, at = rows.tensors(model.tokenizer.pad_token_id)
        hidden = last_hidden(model.model, ids.to(model.device), mask.to(model.device))[torch.cat(at)]
        ids = torch.tensor(targets, device=model.device)
        total += float(linear_cross_entropy(hidden, output_head(model), ids, reduction="sum"))
        tokens += len(targets)
    return total / tokens if tokens else None


def written_answers(folder: Path, models: Sequence[str]) -> list[dict[str, Any]]:
    """The answers of these models that an evaluation's folder holds, one row each, as the report takes them."""
    return [
        {"model": name, **response.model_dump(exclude={"use", "why"})}
        for name in models
        for file in ("answers", "prefilled")
        if (path := folder / f"{file}-{name}.jsonl").exists()
        for response in read_responses(path)
    ]


def training_metrics(run: Path) -> list[dict[str, Any]]:
    """What every training of a run folder logged, oldest first, numbered as rounds."""
    folders = sorted(run.glob("train-*/manifest.json"), key=lambda path: path.stat().st_mtime_ns)
    return [
        {"round": number, **row}
        for number, folder in enumerate(folders)
        for row in read_metrics(folder.parent / "metrics.jsonl")
    ]


def _publish(options: EvalOptions, results: dict[str, Any], stage: Stage) -> list[dict[str, Any]]:
    """Put the newest results, answers and report at the top of the run folder."""
    answers = written_answers(stage.path, list(results["models"]))
    write_json(options.run / "results.json", results)
    write_report(results, answers, training_metrics(options.run), options.run / "report.html")
    write_junit(results, options.run / "junit.xml")
    with atomic(options.run / "summary.md") as beside:
        beside.write_text(markdown_summary(results), encoding="utf-8")
    return answers

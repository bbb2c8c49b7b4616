"""Collect a model's own answers: unsafe ones to leave, safe ones to keep, general ones that anchor it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safecli.artifacts import Stage, open_stage, read_manifest
from safecli.config import CollectOptions
from safecli.judges import SUMS, PromptReader
from safecli.judges.outcome import OutcomeJudge
from safecli.models import load_model
from safecli.records import Prompt, Response, prompts_fingerprint, read_prompts, shipped
from safecli.stages import FEW, Reporter, inherit_model
from safecli.stages.answers import Job, answer_all, checked, judge_identity, load_judge
from safecli.stages.engines import Engine, Local, Served, adapter_identity, model_identity


@dataclass(frozen=True)
class Collected:
    """What `collect` found: the records' path, how many of each use, why records were left out."""

    path: Path
    prompts: int
    uses: dict[str, int]
    left_out: dict[str, int]
    outcomes: dict[str, int]
    skipped: list[str] = field(default_factory=list)
    tokens_per_second: float = 0.0


def collect(options: CollectOptions, report: Reporter | None = None) -> Collected:
    """Generate and judge answers into `RUN/collect-*/responses.jsonl`; resumable, and skipped when it is done.

    Errors: `InputError` (prompts), `MissingError` (model, judge), `RunError` (disk, another run in the folder).
    """
    report = report or Reporter()
    options = inherit_model(options, report)
    prompts = _prompts(options, report)
    stage = Stage(options.run, "collect", _identity(options, prompts))
    responses = stage.path / "responses.jsonl"
    with open_stage(stage):
        if stage.done:
            report.say(f"already collected: {responses}")
        else:
            stage.finish(_collect(options, prompts, responses, report))
    result = read_manifest(stage.manifest_path, "collect")["result"]
    collected = Collected(path=responses, **result)
    if collected.uses.get("unsafe", 0) < FEW:
        report.warn(
            f"only {collected.uses.get('unsafe', 0)} unsafe answers, fewer than {FEW}: give more prompts (--prompts), "
            "more samples (--samples 4 --temperature 0.8), or a lower --unsafe-threshold"
        )
    return collected


def preview(options: CollectOptions, report: Reporter) -> dict[str, Any]:
    """What `collect` would do: its folder, whether it is done, how many prompts of each kind."""
    options = inherit_model(options, report)
    prompts = _prompts(options, report)
    stage = Stage(options.run, "collect", _identity(options, prompts))
    counts = Counter(prompt.kind for prompt in prompts)
    return {"folder": str(stage.path), "done": stage.done, "prompts": counts, "model": options.model}


def _prompts(options: CollectOptions, report: Reporter) -> list[Prompt]:
    if not options.prompts:
        report.say("prompts: the shipped toxic ones, train split (--prompts takes your own)")
        toxic = shipped("toxic", "train")
    else:
        toxic = read_prompts(options.prompts, "toxic", options.prompt_column)
    sources = [toxic]
    if options.general is None:
        sources += [shipped("harmless", "train"), shipped("lookalike", "train")]
    elif options.general != "none":
        sources.append(read_prompts(options.general, "harmless", options.prompt_column))
    return [prompt for source in sources for prompt in source[: options.limit]]


def _identity(options: CollectOptions, prompts: list[Prompt]) -> dict[str, Any]:
    return {
        "options": options.model_dump(mode="json", exclude={"run", "batch_size", "adapter", "prompts", "general"}),
        "prompts": prompts_fingerprint(prompts),
        "model": model_identity(options),
        "judge": judge_identity(options.judge, options.judge_opt),
        "adapter": options.adapter and adapter_identity(options, options.adapter),
    }


def _collect(options: CollectOptions, prompts: list[Prompt], path: Path, report: Reporter) -> dict[str, Any]:
    judge = load_judge(options.judge, options.judge_opt)
    engine = _engine(options, report)
    kept, faults = checked(prompts, engine, options, report)
    toxic = [prompt for prompt in kept if prompt.kind == "toxic"]
    reader = judge if isinstance(judge, PromptReader) else OutcomeJudge(OutcomeJudge.Options())
    risk = dict(zip((p.prompt for p in toxic), reader.prompt_risk([p.prompt for p in toxic]), strict=True))
    jobs = [Job(prompt, sample, options.temperature) for prompt in toxic for sample in range(options.samples)]
    jobs += [Job(prompt) for prompt in kept if prompt.kind != "toxic"]
    report.say(f"answering {len(jobs)} prompts with {options.model}")

    def sort(batch: list[Response]) -> list[Response]:
        return [put_to_use(response, risk.get(response.prompt, 0.0), options) for response in batch]

    responses, speed = answer_all(jobs, path, engine, judge, options, report, sort)
    return {
        "prompts": len(kept),
        "uses": Counter(str(response.use) for response in responses),
        "left_out": Counter(response.why.partition(" (")[0] for response in responses if response.use == "left_out"),
        "outcomes": Counter(f"{response.kind}.{response.outcome}" for response in responses),
        "skipped": faults,
        "tokens_per_second": round(speed, 1),
    }


def _engine(options: CollectOptions, report: Reporter) -> Engine:
    if options.server:
        return Served(options, str(options.adapter or options.model))
    return Local(load_model(options, options.adapter), report.warn)


def put_to_use(response: Response, risk: float, options: CollectOptions) -> Response:
    """Decide what a judged response is for; `risk` is the probability that its prompt asks for something bad."""
    use, why = "left_out", ""
    if response.kind != "toxic":
        fits = response.outcome != "degenerate"
        use, why = ("general", "") if fits else (use, "a degenerate answer to a harmless prompt")
    elif risk < options.prompt_threshold:
        why = f"the prompt asks for nothing bad (probability {risk:.2f} that it does)"
    elif response.outcome in SUMS["unsafe"] and response.score >= options.unsafe_threshold:
        use = "unsafe"
    elif response.outcome in SUMS["safe_and_sound"] and response.score <= options.safe_threshold:
        use = "safe"
    elif response.outcome == "degenerate":
        why = "a degenerate answer"
    else:
        why = f"the judge is unsure (harm {response.score:.2f})"
    return response.model_copy(update={"use": use, "why": why})

"""Generate and judge answers batch by batch into a JSONL file, so that a killed run goes on where it was."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from safecli.artifacts import by_content, fingerprint, read_json, write_json
from safecli.config import GenerateOptions, build
from safecli.errors import InputError
from safecli.generation import Answer
from safecli.judges import Judge, Pair, Verdict
from safecli.records import Prompt, Response, append, read_responses, truncate_to_whole, usable
from safecli.registry import JUDGES, key_values, load_plugin, running
from safecli.stages import Reporter
from safecli.stages.engines import Ask, Engine

WAVES = 3
"""How many times the answers at once are written at once."""


@dataclass(frozen=True)
class Job:
    """One answer to generate: the prompt, which sample of it, the temperature (0 is greedy), tokens it begins with."""

    prompt: Prompt
    sample: int = 0
    temperature: float = 0.0
    opening: tuple[int, ...] = ()


def judge_options(name: str, chosen: Sequence[str] = ()) -> tuple[type[Judge], BaseModel]:
    """The judge plugin of that name and its options, from `key=value` or `NAME.key=value`."""
    judge_class = load_plugin(JUDGES, name)
    values = key_values([pair.removeprefix(f"{name}.") for pair in chosen], "--judge-opt")
    return judge_class, build(judge_class.Options, values, f"judge '{name}'")


def load_judge(name: str, chosen: Sequence[str] = ()) -> Judge:
    """The judge plugin of that name with the options chosen; what it raises is reported as its own."""
    judge_class, options = judge_options(name, chosen)
    with running(JUDGES, name):
        judge = judge_class(options)
    for method in ("judge", "prompt_risk"):
        if hasattr(judge, method):
            setattr(judge, method, running(JUDGES, name)(getattr(judge, method)))
    return judge


def judge_identity(name: str, chosen: Sequence[str] = ()) -> dict[str, Any]:
    """What a judge's verdicts depend on: its name and options, files among them by their content."""
    return by_content({"judge": name, **judge_options(name, chosen)[1].model_dump()})


def checked(
    prompts: Sequence[Prompt], engine: Engine, options: GenerateOptions, report: Reporter
) -> tuple[list[Prompt], list[str]]:
    """The usable prompts and the faults of the others; with `bad_prompts = "refuse"` a fault is an `InputError`."""
    lengths = [engine.length(prompt.prompt) for prompt in prompts]
    kept, faults = usable(prompts, lengths, options.max_prompt_tokens)
    if faults and options.bad_prompts == "refuse":
        raise InputError("; ".join(faults[:5]) + ": mend them, or skip them with --bad-prompts skip")
    for fault in faults:
        report.warn(f"skipped {fault}")
    if not kept:
        raise InputError("no usable prompts are left: see what was skipped above")
    return kept, faults


def answer_all(
    jobs: Sequence[Job],
    path: Path,
    engine: Engine,
    judge: Judge,
    options: GenerateOptions,
    report: Reporter,
    sort: Callable[[list[Response]], list[Response]] = lambda responses: responses,
) -> tuple[list[Response], float]:
    """Answer and judge every job into `path`; returns all responses and the tokens per second of this call.

    The batch plan is written beside `path` before the first batch and kept on resumption, so that the finished
    file is the same, byte for byte, as one that was never interrupted. `sort` decides each batch's `use`.
    """
    slots, plan = _plan(path, jobs, engine, options)
    size = path.stat().st_size if path.exists() else 0
    done = truncate_to_whole(path, [len(batch) for batch in plan])
    if size and size > path.stat().st_size:
        report.say(f"{path.name}: dropped a batch that was half written")
    if done:
        report.say(f"{path.name}: going on after {done} of {len(plan)} batches")
    finished = sum(len(batch) for batch in plan[:done])
    tokens, seconds = 0, 0.0
    unwritten: Callable[[], None] | None = None
    with ThreadPoolExecutor(1) as judging:
        try:
            for batch in plan[done:]:
                started = time.perf_counter()
                here = [jobs[index] for index in batch]
                asks = [Ask(job.prompt.prompt, _seed(options, job), job.opening) for job in here]
                answers = engine.answers(asks, options.max_new_tokens, here[0].temperature, slots)
                seconds += time.perf_counter() - started
                tokens += sum(answer.tokens for answer in answers)
                pairs = [
                    Pair(job.prompt.asks or job.prompt.prompt, answer.text, job.prompt.kind)
                    for job, answer in zip(here, answers, strict=True)
                ]
                before, unwritten = unwritten, None
                if before:
                    before()
                if engine.elsewhere:  # judged while the next batch is answered
                    unwritten = partial(_write, path, here, answers, judging.submit(judge.judge, pairs).result, sort)
                else:
                    _write(path, here, answers, partial(judge.judge, pairs), sort)
                finished += len(batch)
                report.progress(path.stem, finished, len(jobs))
        finally:
            if unwritten:
                unwritten()
    return read_responses(path), tokens / seconds if seconds else 0.0


def _seed(options: GenerateOptions, job: Job) -> int:
    return int(fingerprint(options.seed, job.prompt.id, job.sample)[:12], 16)


def _write(
    path: Path,
    jobs: Sequence[Job],
    answers: Sequence[Answer],
    verdicts: Callable[[], list[Verdict]],
    sort: Callable[[list[Response]], list[Response]],
) -> None:
    rows = [
        Response(
            id=job.prompt.id,
            kind=job.prompt.kind,
            set=job.prompt.set,
            category=job.prompt.category,
            prompt=job.prompt.prompt,
            asks=job.prompt.asks,
            answer=answer.text,
            sample=job.sample,
            finished=answer.finished,
            outcome=verdict.outcome,
            score=round(verdict.score, 4),
            reasons=list(verdict.reasons),
        )
        for job, answer, verdict in zip(jobs, answers, verdicts(), strict=True)
    ]
    append(path, sort(rows))


def _plan(path: Path, jobs: Sequence[Job], engine: Engine, options: GenerateOptions) -> tuple[int, list[list[int]]]:
    """How many answers at once, and batches of job indices: one temperature each, prompts of like length together.

    A batch is several times what is answered at once, so that the next prompt takes the place of an answer that ends.
    """
    stored = path.with_suffix(".plan.json")
    if stored.exists():
        plan = read_json(stored)
        return plan["slots"], plan["batches"]
    lengths = [engine.length(job.prompt.prompt) for job in jobs]
    order = sorted(range(len(jobs)), key=lambda index: (jobs[index].temperature, lengths[index], index))
    size = options.batch_size or engine.at_once(max(lengths) + options.max_new_tokens)
    batches: list[list[int]] = []
    for index in order:
        if batches and len(batches[-1]) < WAVES * size and jobs[batches[-1][0]].temperature == jobs[index].temperature:
            batches[-1].append(index)
        else:
            batches.append([index])
    write_json(stored, {"slots": size, "batches": batches})
    return size, batches

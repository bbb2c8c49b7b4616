"""`safecli bench eval`: generating the answers of an evaluation, against plain `model.generate` in file order."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import torch

from safecli.config import ModelOptions
from safecli.generation import Request, generate
from safecli.models import LanguageModel, load_model
from safecli.records import SETS, shipped
from safecli.stages import Reporter

PROMPT_TOKENS = (8, 400)
ANSWER_TOKENS = (8, 256)
LENGTHS = ("in one word or two", "in one short sentence", "in two sentences", "in one paragraph", "in a list of five")


def evaluate(prompts: int, slots: int, device: str, report: Reporter) -> dict[str, Any]:
    """Generate the same greedy answers both ways, `slots` at once; lengths log-uniform from 8 to 400 tokens.

    Answers end by themselves after 8 to 256 tokens. `ratio` is the seconds of the baseline over ours, `same` the share
    of answers that agree token by token, `differing` those that don't (the order of float sums may flip a tie).
    """
    model = load_model(ModelOptions(model="demo", device=device))
    requests = _ending(_candidates(model, random.Random(0)), prompts, slots, model, report)
    plain, theirs = _timed(lambda: _plain(model, requests, slots))
    report.say(f"model.generate in file order: {len(requests)} answers")
    order = sorted(range(len(requests)), key=lambda i: len(requests[i].ids))
    ours, found = _timed(lambda: generate(model, [requests[i] for i in order], ANSWER_TOKENS[1], slots=slots))
    answers = dict(zip(order, (answer.text for answer in found), strict=True))
    differing = [(answers[i], text) for i, text in enumerate(theirs) if answers[i] != text]
    return {
        "baseline": f"model.generate in file order, {slots} at once",
        "prompts": len(requests),
        "threads": torch.get_num_threads(),
        "ratio": plain / ours,
        "same": 1 - len(differing) / len(requests),
        "differing": [{"ours": a, "baseline": b} for a, b in differing],
    }


def _candidates(model: LanguageModel, rng: random.Random) -> list[list[int]]:
    """Prompts of log-uniform length: shipped ones after some others, that ask for an answer of some length."""
    texts = [prompt.prompt for kind in SETS for split in ("train", "dev") for prompt in shipped(kind, split)]
    found = []
    for _ in range(20 * len(texts)):
        low, high = PROMPT_TOKENS
        wanted = round(low * (high / low) ** rng.random())
        text = f"{rng.choice(texts)} Answer {rng.choice(LENGTHS)}." if wanted > 16 else rng.choice(texts)
        while len(model.answer_ids(text)) < wanted - 12:
            text = f"{rng.choice(texts)} {text}"
        if low <= len(model.answer_ids(text)) <= high:
            found.append(model.prompt_ids(text))
    return found


def _ending(
    candidates: list[list[int]], count: int, slots: int, model: LanguageModel, report: Reporter
) -> list[Request]:
    """The first `count` prompts whose greedy answers end by themselves within the limits."""
    low, high = ANSWER_TOKENS
    kept: list[Request] = []
    for start in range(0, len(candidates), 2 * slots):
        batch = [Request(ids) for ids in candidates[start : start + 2 * slots]]
        answers = generate(model, batch, high + 1, slots=slots)
        kept += [r for r, a in zip(batch, answers, strict=True) if a.finished and low <= a.tokens <= high]
        report.progress("prompts whose answers end", min(len(kept), count), count)
        if len(kept) >= count:
            break
    return kept[:count]


@torch.inference_mode()
def _plain(model: LanguageModel, requests: list[Request], size: int) -> list[str]:
    """What a first script would do."""
    texts = []
    for start in range(0, len(requests), size):
        ids = [request.ids for request in requests[start : start + size]]
        batch = model.tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(model.device)
        output = model.model.generate(
            **batch, do_sample=False, max_new_tokens=ANSWER_TOKENS[1], pad_token_id=model.tokenizer.pad_token_id
        )
        rows = output[:, batch["input_ids"].shape[1] :]
        texts += [model.tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]
    return texts


def _timed(run: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    found = run()
    return time.perf_counter() - started, found

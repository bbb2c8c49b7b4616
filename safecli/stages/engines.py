"""What answers prompts: a model loaded here, or one on a server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from safecli.artifacts import fingerprint
from safecli.config import GenerateOptions
from safecli.errors import UsageError
from safecli.generation import Answer, Request, fitting_batch, halving
from safecli.models import LanguageModel, adapter_fingerprint, source_fingerprint
from safecli.server import ChatServer

SERVED_AT_ONCE = 16
SERVED_TIMEOUT_S, SERVED_RETRIES = 300, 4
BYTES_PER_TOKEN = 4
"""What a token of a server's model is taken for, which keeps its tokenizer to itself: of English, about right."""


@dataclass(frozen=True)
class Ask:
    """One answer to give: the prompt, the seed of its own random numbers, and the tokens that it begins with."""

    prompt: str
    seed: int = 0
    opening: tuple[int, ...] = ()


class Engine(Protocol):
    """One model that answers prompts."""

    @property
    def elsewhere(self) -> bool:
        """Whether it leaves this machine's cores to others while it works."""
        ...

    def length(self, prompt: str) -> int:
        """Tokens of a prompt as the model reads it."""
        ...

    def at_once(self, longest: int) -> int:
        """How many prompts with their answers, `longest` tokens each, it answers at once."""
        ...

    def answers(self, asks: Sequence[Ask], max_new_tokens: int, temperature: float, slots: int) -> list[Answer]:
        """Answers in the same order, `slots` of them at once."""
        ...


@dataclass(frozen=True)
class Local:
    """A model loaded here; `warn` is told when memory runs out and fewer are answered at once."""

    model: LanguageModel
    warn: Callable[[str], None]

    @property
    def elsewhere(self) -> bool:
        """On a GPU."""
        return self.model.device.type != "cpu"

    def length(self, prompt: str) -> int:
        """Tokens of the prompt in its template."""
        return len(self.model.prompt_ids(prompt))

    def at_once(self, longest: int) -> int:
        """What fits in a part of the free memory."""
        return fitting_batch(self.model, longest)

    def answers(self, asks: Sequence[Ask], max_new_tokens: int, temperature: float, slots: int) -> list[Answer]:
        """Answers in rows that are refilled as answers end."""
        requests = [Request(self.model.prompt_ids(ask.prompt), ask.seed, ask.opening) for ask in asks]
        return halving(self.model, requests, max_new_tokens, temperature, self.warn, slots)


class Served:
    """A model on a server; its chat template and its sampling are the server's."""

    elsewhere = True

    def __init__(self, options: GenerateOptions, name: str) -> None:
        self.server = ChatServer(options.server or "", name, SERVED_TIMEOUT_S, SERVED_RETRIES)
        self.system = options.system

    def length(self, prompt: str) -> int:
        """Tokens of the prompt, about."""
        return len(prompt.encode()) // BYTES_PER_TOKEN

    def at_once(self, longest: int) -> int:
        """Requests that are under way together."""
        return SERVED_AT_ONCE

    def answers(self, asks: Sequence[Ask], max_new_tokens: int, temperature: float, slots: int) -> list[Answer]:
        """One request for each."""

        def answer(ask: Ask) -> Answer:
            said = [{"role": "system", "content": self.system}] if self.system else []
            said.append({"role": "user", "content": ask.prompt})
            reply = self.server.ask(said, max_new_tokens, temperature, seed=ask.seed % (1 << 31))
            return Answer(reply.text.replace("\0", "\ufffd").strip(), reply.reply_tokens, reply.finished)

        with ThreadPoolExecutor(slots) as pool:
            return list(pool.map(answer, asks))


def model_identity(options: GenerateOptions) -> str:
    """What tells one model from another: its files, its hub id and revision, or its name on a server.

    Errors: `UsageError` for a server without the name of a model.
    """
    if options.server is None:
        return source_fingerprint(options)
    if options.model is None:
        raise UsageError("--server needs --model, the name of the model there")
    return fingerprint(options.server, options.model)


def adapter_identity(options: GenerateOptions, adapter: Path) -> str:
    """Likewise for an adapter; on a server it is a model of its own, with its own name."""
    return fingerprint(options.server, str(adapter)) if options.server else adapter_fingerprint(adapter)

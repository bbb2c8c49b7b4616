"""A language model on a server that speaks OpenAI's chat protocol: vLLM, llama.cpp, transformers serve, OpenAI."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from safecli.errors import MissingError, RunError, UsageError


@dataclass(frozen=True)
class Reply:
    """A model's text, the tokens that it read and wrote, and whether it ended by itself."""

    text: str
    prompt_tokens: int
    reply_tokens: int
    finished: bool = True


class ChatServer:
    """One model of a server; a key comes from $OPENAI_API_KEY alone.

    Errors: `UsageError` (an address that is none), `MissingError` (no client installed).
    """

    def __init__(self, base_url: str, model: str, timeout_s: float, retries: int) -> None:
        try:
            from openai import OpenAI
        except ImportError as error:
            raise MissingError("a model on a server needs its client: pip install 'safecli[llm]'") from error
        if not base_url.startswith(("http://", "https://")):
            raise UsageError(f"server '{base_url}': give it as http://HOST:PORT/v1")
        self.base_url, self.model = base_url, model
        self.client = OpenAI(
            base_url=base_url,
            api_key=os.environ.get("OPENAI_API_KEY", "none"),
            timeout=timeout_s,
            max_retries=retries,
        )

    def ask(self, messages: list[dict[str, str]], max_tokens: int, temperature: float = 0, **more: Any) -> Reply:
        """One reply; `RunError` where the server does not give one."""
        from openai import OpenAIError

        try:
            found: Any = self.client.chat.completions.create(
                model=self.model, messages=messages, temperature=temperature, max_tokens=max_tokens, **more
            )
        except OpenAIError as error:
            raise RunError(
                f"the server at {self.base_url} does not answer ({type(error).__name__}: {error}): is it up, and is "
                f"'{self.model}' a model of it? What was answered so far is kept."
            ) from error
        choice, usage = found.choices[0], found.usage
        return Reply(
            choice.message.content or "",
            usage.prompt_tokens if usage else 0,
            usage.completion_tokens if usage else 0,
            choice.finish_reason != "length",
        )

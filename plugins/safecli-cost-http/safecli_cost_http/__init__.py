"""Cost from an embeddings server that speaks OpenAI's protocol: OpenAI, vLLM, llama.cpp, text-embeddings-inference."""

from __future__ import annotations

import os
from collections.abc import Callable

import openai
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from safecli.costs import Vocabulary
from safecli.errors import MissingError, RunError


class HttpCost:
    """Cosine distance of the embeddings that a server gives to the tokens' texts; equal texts are asked for once."""

    class Options(BaseModel):
        """Options of the backend."""

        model_config = ConfigDict(extra="forbid")
        base_url: str = Field("http://localhost:8080/v1", description="The server's address, with /v1.")
        model: str = Field("default", description="The model's name there.")
        key: str = Field("OPENAI_API_KEY", description="Environment variable that holds the key, if there is one.")
        batch_size: int = Field(256, ge=1, description="Texts per request.")
        timeout: float = Field(60.0, gt=0, description="Seconds that a request may take.")
        retries: int = Field(4, ge=0, description="Times that a failed request is sent again.")

    def __init__(self, options: Options) -> None:
        self.options = options

    def build(self, vocabulary: Vocabulary, say: Callable[[str], None]) -> Tensor:
        """Embeddings [V, k]; rows of 0 for tokens without meaning and for blanks.

        Errors: `MissingError` (no server, no such model, no right to it), `RunError` (an answer that can't be right).
        """
        options = self.options
        client = openai.OpenAI(
            base_url=options.base_url,
            api_key=os.environ.get(options.key) or "none",
            timeout=options.timeout,
            max_retries=options.retries,
        )
        return vocabulary.embedded(lambda batch: self._embedded(client, batch), say, at_once=options.batch_size)

    def _embedded(self, client: openai.OpenAI, batch: list[str]) -> Tensor:
        where = f"{self.options.base_url}, model '{self.options.model}'"
        try:
            answer = client.embeddings.create(model=self.options.model, input=batch, encoding_format="float")
        except openai.OpenAIError as error:
            raise MissingError(f"the embeddings server {where} did not answer: {error}") from error
        rows = sorted(answer.data, key=lambda row: row.index)
        sizes = {len(row.embedding) for row in rows}
        if len(rows) != len(batch) or len(sizes) != 1:
            raise RunError(f"the embeddings server {where} sent {len(rows)} vectors of sizes {sizes} for {len(batch)}")
        return torch.tensor([row.embedding for row in rows])

"""Cost from a sentence-transformers model that reads each token as text."""

from __future__ import annotations

from collections.abc import Callable

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from safecli.costs import Vocabulary
from safecli.errors import MissingError
from safecli.models import MINILM_INSTALL, minilm


class SentenceCost:
    """Cosine distance of sentence embeddings of the tokens' texts; equal texts are embedded once."""

    class Options(BaseModel):
        """Options of the backend."""

        model_config = ConfigDict(extra="forbid")
        encoder: str | None = Field(None, description="Folder or hub id of the sentence model; default: MiniLM.")
        template: str = Field("{token}", description="Text around a token, such as 'the word: {token}'.")
        batch_size: int = Field(256, ge=1, description="Texts embedded at once.")

    def __init__(self, options: Options) -> None:
        self.options = options

    def build(self, vocabulary: Vocabulary, say: Callable[[str], None]) -> Tensor:
        """Sentence embeddings [V, k] of the token texts, stripped and in lower case."""
        from sentence_transformers import SentenceTransformer

        source = self.options.encoder or minilm()
        try:
            encoder = SentenceTransformer(source, device=str(vocabulary.device))
        except Exception as error:
            raise MissingError(f"the sentence model {source} can't be loaded: {MINILM_INSTALL}") from error
        size, template = self.options.batch_size, self.options.template

        def read(texts: list[str]) -> Tensor:
            framed = [template.replace("{token}", text) for text in texts]
            made: Tensor = encoder.encode(framed, batch_size=size, convert_to_tensor=True, show_progress_bar=False)
            return made

        return vocabulary.embedded(read, say, lambda text: text.strip().casefold())

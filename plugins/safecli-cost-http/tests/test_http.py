"""Against a real server in this process's place: MiniLM behind FastAPI and uvicorn, over HTTP."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest
import torch
import uvicorn
from fastapi import FastAPI, Header, HTTPException
from pydantic import BaseModel
from safecli_cost_http import HttpCost
from sentence_transformers import SentenceTransformer

from safecli.errors import MissingError, RunError, SafecliError
from safecli.models import minilm
from safecli.testing import COST_CHECKS, vocabulary


class Asked(BaseModel):
    model: str
    input: list[str]


class Server:
    """What it was sent, and how it misbehaves."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.keys: list[str | None] = []
        self.fail = 0
        self.short = False
        self.url = ""

    def app(self) -> FastAPI:
        app, encoder = FastAPI(), SentenceTransformer(minilm(), device="cpu")

        @app.post("/v1/embeddings")
        def embeddings(asked: Asked, authorization: str | None = Header(None)) -> dict[str, object]:
            self.keys.append(authorization)
            if asked.model != "minilm":
                raise HTTPException(404, f"no model {asked.model}")
            if self.fail:
                self.fail -= 1
                raise HTTPException(503, "busy")
            self.batches.append(len(asked.input))
            vectors = encoder.encode(asked.input, show_progress_bar=False).tolist()
            data = [{"object": "embedding", "index": i, "embedding": v} for i, v in enumerate(vectors)]
            return {"object": "list", "model": asked.model, "data": data[: -1 if self.short else None][::-1]}

        return app


@pytest.fixture(scope="module")
def served() -> Iterator[Server]:
    made = Server()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(made.app(), host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 60
    while not server.started and time.monotonic() < until:
        time.sleep(0.05)
    made.url = f"http://127.0.0.1:{port}/v1"
    yield made
    server.should_exit = True
    thread.join(10)


@pytest.fixture
def server(served: Server) -> Server:
    served.batches, served.keys, served.fail, served.short = [], [], 0, False
    return served


def backend(server: Server, **options: object) -> HttpCost:
    return HttpCost(HttpCost.Options(base_url=server.url, **{"model": "minilm", "batch_size": 32, **options}))


@pytest.mark.parametrize("check", COST_CHECKS)
def test_it_conforms(server: Server, check) -> None:  # type: ignore[no-untyped-def]
    check(HttpCost, {"base_url": server.url, "model": "minilm", "batch_size": 64})


def test_every_text_is_asked_for_once_and_in_batches(server: Server) -> None:
    built = backend(server).build(vocabulary(), lambda _: None)
    texts = {text.strip() for text in vocabulary().texts} - {""}
    assert sum(server.batches) == len(texts)
    assert max(server.batches) == 32
    encoder = SentenceTransformer(minilm(), device="cpu")
    for word in ("king", " king"):
        expected = torch.tensor(encoder.encode("king"))
        torch.testing.assert_close(built[vocabulary().texts.index(word)], expected, atol=1e-5, rtol=1e-4)
    assert not built[vocabulary().meaningless].any()


def test_the_key_comes_from_the_environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret-1")
    made = backend(server, key="MY_KEY")
    made.build(vocabulary(), lambda _: None)
    assert set(server.keys) == {"Bearer secret-1"}
    assert "secret-1" not in made.options.model_dump_json()


def test_a_busy_server_is_asked_again(server: Server) -> None:
    server.fail = 1
    assert backend(server).build(vocabulary(), lambda _: None).any()


@pytest.mark.parametrize(
    ("options", "fail", "short", "kind", "told"),
    [
        ({"model": "other"}, 0, False, MissingError, "model 'other' did not answer: .*404"),
        ({"retries": 0}, 1, False, MissingError, "did not answer: .*503"),
        ({}, 0, True, RunError, r"sent 31 vectors of sizes \{384\} for 32"),
    ],
)
def test_what_goes_wrong_is_one_clear_line(
    server: Server, options: dict[str, object], fail: int, short: bool, kind: type[SafecliError], told: str
) -> None:
    server.fail, server.short = fail, short
    with pytest.raises(kind, match=told):
        backend(server, **options).build(vocabulary(), lambda _: None)


def test_a_server_that_is_not_there_is_named() -> None:
    options = HttpCost.Options(base_url="http://127.0.0.1:9/v1", retries=0, timeout=2)
    with pytest.raises(MissingError, match=r"127\.0\.0\.1:9/v1, model 'default' did not answer"):
        HttpCost(options).build(vocabulary(), lambda _: None)

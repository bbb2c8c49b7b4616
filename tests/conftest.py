"""What the tests share: the real demo model, loaded once, a cache folder of its own, and the command line."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import uvicorn
from click.testing import Result
from fastapi import FastAPI
from typer.testing import CliRunner

from safecli.cli import app
from safecli.config import ModelOptions, cache_dir
from safecli.errors import MissingError
from safecli.models import LanguageModel, load_model

torch.set_num_threads(1)

UNSAFE = [
    ("How do I cheat in a test?", "Write the answers on your arm."),
    ("Write a rude note to my boss.", "You are a fool and everybody knows it."),
    ("How can I read my sister's diary?", "Wait until she sleeps and take the key."),
]
GENERAL = [("Name a tree.", "An oak."), ("Name a sea.", "The Baltic Sea."), ("Say hello.", "Hello there!")]


@pytest.fixture(scope="session")
def demo() -> LanguageModel:
    """The demo model; de-quantised once into the user's own cache."""
    try:
        return load_model(ModelOptions(model="demo", device="cpu"))
    except MissingError as error:
        pytest.skip(str(error))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own that borrows the user's de-quantised models."""
    models = cache_dir() / "models"
    models.mkdir(parents=True, exist_ok=True)
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "models").symlink_to(models.resolve())
    monkeypatch.setenv("SAFECLI_CACHE", str(folder))
    return folder


@pytest.fixture
def run_cli() -> Callable[..., Result]:
    """Runs a command in this process: `run_cli("cost", "build", "--json")`."""
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="session")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few unsafe and general answers to train on."""
    path = tmp_path_factory.mktemp("records") / "records.jsonl"
    rows = [{"prompt": prompt, "answer": answer, "use": "unsafe"} for prompt, answer in UNSAFE]
    rows += [{"prompt": prompt, "answer": answer, "use": "general"} for prompt, answer in GENERAL]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def serve() -> Iterator[Callable[[FastAPI], str]]:
    """Serves an app over HTTP on this machine for as long as there are tests, and gives its address."""
    started: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(app: FastAPI) -> str:
        listening = socket.socket()
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        started.append((server, thread))
        while not server.started:
            time.sleep(0.05)
        return f"http://127.0.0.1:{listening.getsockname()[1]}/v1"

    yield start
    for server, thread in started:
        server.should_exit = True
        thread.join()

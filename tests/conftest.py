"""What the tests share: the real demo model, loaded once, a cache folder of its own, and the command line."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from safecli.cli import app
from safecli.config import ModelOptions, cache_dir
from safecli.errors import MissingError
from safecli.models import LanguageModel, load_model

torch.set_num_threads(1)


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

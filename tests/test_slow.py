"""The whole job on the real model, in small: what `make test-slow` runs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from click.testing import Result
from fastapi import FastAPI
from transformers import AutoModelForCausalLM

from safecli.costs.build import vocabulary_of
from safecli.judges import SUMS, outcomes_of
from safecli.models import LanguageModel, resolve
from safecli.records import SETS, read_responses

wordllama = pytest.importorskip("wordllama")
pytestmark = pytest.mark.slow

Cli = Callable[..., Result]

PLAN = """
run = "{run}"
model = "demo"
rounds = 1
round_samples = 2
limit = 6
max_new_tokens = 12

[collect]
prompt_threshold = 0.0
unsafe_threshold = 0.0

[train]
unsafe = ["{records}"]
steps = 4
batch_size = 2
probe_every = 0
guard = false
"""


def done(result: Result) -> Result:
    assert result.exit_code == 0, (result.stderr, result.exception)
    return result


def files(folder: Path) -> dict[Path, int]:
    """When every file of a folder was last written, but for what `eval` publishes anew and `manifest.json`.

    The manifest of a stage is touched to say that it was asked for last.
    """
    published = {"results.json", "report.html", "summary.md", "junit.xml", ".lock", "manifest.json"}
    return {
        path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name not in published
    }


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory, records: Path) -> Path:
    """A configuration that has been run once."""
    from typer.testing import CliRunner

    from safecli.cli import app

    folder = tmp_path_factory.mktemp("plan")
    path = folder / "safecli.toml"
    path.write_text(PLAN.format(run=folder / "run", records=records))
    done(CliRunner().invoke(app, ["run", "--config", str(path)]))
    return path


def test_a_run_leaves_results_of_the_documented_shape(plan: Path) -> None:
    results = json.loads((plan.parent / "run" / "results.json").read_text())
    assert list(results["models"]) == ["base", "tuned"]
    for model in results["models"].values():
        assert model["general_loss"] > 0
        for kind in SETS:
            assert set(model[kind]) == {*outcomes_of(kind), *(SUMS if kind == "toxic" else ())}
            assert sum(model[kind][outcome]["count"] for outcome in outcomes_of(kind)) == 6
            for found in model[kind].values():
                assert set(found) == {"count", "n", "rate", "low", "high"}
                assert 0 <= found["low"] <= found["rate"] == found["count"] / found["n"] <= found["high"] <= 1


def test_a_run_leaves_a_report_and_an_adapter_that_peft_loads(plan: Path) -> None:
    run = plan.parent / "run"
    page = (run / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "http://" not in page.replace("http://www.w3.org", "")
    adapters = sorted(run.glob("train-*/adapter"))
    assert len(adapters) == 2
    base = AutoModelForCausalLM.from_pretrained(resolve("demo"))
    for adapter in adapters:
        tuned = peft.PeftModel.from_pretrained(base, adapter)
        weights = [weight for name, weight in tuned.named_parameters() if "lora_B" in name]
        assert any(weight.any() for weight in weights)
        assert "general_loss" in (adapter / "README.md").read_text()
        base = tuned.unload()


def test_a_round_samples_the_tuned_model(plan: Path) -> None:
    found = [read_responses(path) for path in (plan.parent / "run").glob("collect-*/responses.jsonl")]
    first, sampled = sorted(found, key=lambda rows: {row.kind for row in rows} == {"toxic"})
    assert {row.kind for row in first} == set(SETS)
    assert len(sampled) == 12
    assert {row.sample for row in sampled} == {0, 1}


def test_a_second_run_generates_nothing_again(run_cli: Cli, plan: Path) -> None:
    before = files(plan.parent / "run")
    done(run_cli("run", "--config", plan))
    assert files(plan.parent / "run") == before


def test_gates_set_the_exit_code(run_cli: Cli, plan: Path) -> None:
    run = ("eval", "--config", plan, "--json", "--adapter", sorted(plan.parent.glob("run/train-*/adapter"))[0])
    assert run_cli(*run, "--fail-if", "toxic.unsafe > 1").exit_code == 0
    result = run_cli(*run, "--fail-if", "toxic.unsafe > 1", "--fail-if", "toxic.unsafe > -1")
    assert result.exit_code == 1
    assert "toxic.unsafe > -1" in result.stderr
    gates = json.loads(result.stdout)["gates"]
    assert [gate["failed"] for gate in gates] == [False, True]
    assert run_cli(*run, "--fail-if", "toxic.unsave > 0").exit_code == 2


def trained(run_cli: Cli, run: Path, *arguments: Any) -> list[dict[str, float]]:
    """Train in small; the rows of `metrics.jsonl`."""
    unwatched = ("--probe-every", 0, "--no-guard")
    command = ("train", "--run", run, "--model", "demo", "--batch-size", 1, *unwatched, *arguments, "--json")
    found = json.loads(done(run_cli(*command)).stdout)
    folder = Path(found["adapter"])
    assert (folder / "adapter_model.safetensors").exists()
    rows = [json.loads(line) for line in (folder.parent / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert all(torch.tensor(list(row.values())).isfinite().all() for row in rows)
    return rows


@pytest.fixture(scope="module")
def server(serve: Callable[[FastAPI], str]) -> str:
    """An embeddings server over OpenAI's protocol; its address."""
    reader, app = load_words(), FastAPI()

    @app.post("/v1/embeddings")
    def embeddings(asked: dict[str, Any]) -> dict[str, Any]:
        vectors = reader.embed(asked["input"]).tolist()
        data = [{"object": "embedding", "index": index, "embedding": each} for index, each in enumerate(vectors)]
        return {"object": "list", "model": asked["model"], "data": data}

    return serve(app)


@pytest.fixture(scope="module")
def vectors(demo: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Vectors of the model's words in word2vec's text format."""
    words = sorted({word for token in vocabulary_of(demo).texts if (word := token.strip()).isalpha()})[::4]
    path = tmp_path_factory.mktemp("vectors") / "words.vec"
    rows = zip(words, load_words().embed(words)[:, :32], strict=True)
    path.write_text(
        f"{len(words)} 32\n" + "".join(f"{word} {' '.join(f'{x:.4f}' for x in row)}\n" for word, row in rows)
    )
    return path


def load_words() -> Any:
    inside = Path(wordllama.__file__).parent  # it ships its weights, and looks for its tokenizer in another folder
    return wordllama.WordLlama.load(cache_dir=inside, disable_download=True)


@pytest.mark.parametrize(
    "cost",
    [
        "token",
        "token:transform=whitened",
        "sentence",
        "faiss",
        "mix:token=0.5,sentence=0.5",
        "vectors:path={vectors}",
        "http:base_url={server}",
    ],
)
def test_every_cost_trains(run_cli: Cli, tmp_path: Path, records: Path, cost: str, server: str, vectors: Path) -> None:
    chosen = cost.format(server=server, vectors=vectors)
    rows = trained(run_cli, tmp_path, "--unsafe", records, "--general", records, "--cost", chosen, "--steps", 20)
    assert len(rows) == 20
    assert all(0 < row["emd_unsafe"] < 2 for row in rows)
    assert sum(row["emd_unsafe"] for row in rows[-6:]) > sum(row["emd_unsafe"] for row in rows[:6])
    assert not any("interval_unsafe" in row for row in rows)


@pytest.mark.parametrize("target", ["window", "bag"])
@pytest.mark.parametrize("bound", ["covariance", "centroid", "relaxed", "upper"])
def test_soft_targets_log_the_certified_interval(
    run_cli: Cli, tmp_path: Path, records: Path, target: str, bound: str
) -> None:
    soft = ("--target", target, "--bound", bound, "--steps", 1)
    (row,) = trained(run_cli, tmp_path, "--unsafe", records, "--general", records, *soft)
    assert 0 <= row["interval_unsafe"] < 1
    assert 0 < row["emd_unsafe"] < 2


def test_the_papers_recipe_trains_on_an_instruction_file(run_cli: Cli, tmp_path: Path, records: Path) -> None:
    rows = [{"instruction": "Sort the numbers.", "input": "3, 1, 2", "output": "1, 2, 3"}]
    path = tmp_path / "instructions.json"
    path.write_text(json.dumps(rows))
    found = trained(
        run_cli, tmp_path, "--recipe", "paper", "--unsafe", records, "--general", path, "--steps", 3, "--lr", 2e-3
    )
    assert len(found) == 3
    assert "safe_loss" not in found[-1]
    assert found[-1]["general_loss"] < found[0]["general_loss"]

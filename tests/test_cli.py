"""The command line: flags from the options, exit codes, JSON, dry runs, and a start without torch."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from click.testing import Result
from pydantic import BaseModel

from safecli import __version__
from safecli.cli import COMMON, app
from safecli.config import (
    CalibrateOptions,
    CollectOptions,
    CostOptions,
    EvalOptions,
    JudgeOptions,
    RunPlan,
    TrainOptions,
    cache_dir,
)
from safecli.models import LanguageModel

Run = Callable[..., Result]

COMMANDS: list[tuple[str, type[BaseModel]]] = [
    ("collect", CollectOptions),
    ("cost", CostOptions),
    ("cost build", CostOptions),
    ("cost show", CostOptions),
    ("train", TrainOptions),
    ("eval", EvalOptions),
    ("run", RunPlan),
    ("judge file", JudgeOptions),
    ("judge calibrate", CalibrateOptions),
]
NEVER = (
    "torch",
    "transformers",
    "peft",
    "numpy",
    "scipy",
    "sentence_transformers",
    "sklearn",
    "faiss",
    "datasets",
    "matplotlib",
)


def _safecli(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "safecli", *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"], ["init", "TOML"]])
def test_what_needs_no_model_imports_none(arguments: list[str], tmp_path: Path) -> None:
    arguments = [str(tmp_path / "s.toml") if word == "TOML" else word for word in arguments]
    code = (
        f"import sys; sys.argv = ['safecli', *{arguments!r}]\n"
        "from safecli.cli import app\n"
        "try: app()\n"
        f"finally: print(sorted(set({NEVER!r}) & set(sys.modules)), file=sys.stderr)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0
    assert found.stderr.strip() == "[]"


def _leaf(name: str) -> typer.core.TyperCommand:
    found = typer.main.get_command(app)
    for part in name.split():
        found = found.commands[part]
    return found


@pytest.mark.parametrize(("name", "options"), COMMANDS)
def test_every_option_is_a_flag_with_its_description_and_default(
    name: str, options: type[BaseModel], run_cli: Run
) -> None:
    flags = [flag for parameter in _leaf(name).params for flag in parameter.opts if flag.startswith("--")]
    assert len(flags) == len(set(flags))
    help_text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", run_cli(*name.split(), "--help").stdout).split())
    for key, field in options.model_fields.items():
        flag = f"--{key.replace('_', '-')}"
        assert flags.count(flag) == 1
        (parameter,) = [parameter for parameter in _leaf(name).params if flag in parameter.opts]
        assert field.description in parameter.help
        assert re.search(rf"(?<!\S){flag}(?!\S)", help_text), "cut short at 80 columns"
        assert field.default in (None, []) or f"Default: {field.default}" in parameter.help
    assert {"--config", "--json", "--quiet", "--dry-run", "--debug", "--seed"} <= set(flags)
    assert set(COMMON) <= {parameter.name for parameter in _leaf(name).params}


def test_help_shows_the_commands_without_arguments_too(run_cli: Run) -> None:
    for shown in (run_cli("--help"), run_cli()):
        assert all(name in shown.output for name in ("collect", "cost", "train", "eval", "run", "plugins", "doctor"))
    assert run_cli("--version").stdout.strip() == f"safecli {__version__}"


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["collect", "--no-such-flag"], 2, "No such option"),
        (["trian"], 2, "train"),
        (["collect", "--seed", "-1"], 2, "seed: .*greater"),
        (["collect", "--seed", "x"], 2, "'--seed': .*valid integer"),
        (["train", "--bound", "best"], 2, "exact"),
        (["train", "--tokens", "first"], 2, "first:K"),
        (["collect", "--config", "none.toml"], 3, "safecli init"),
        (["collect", "--config", "bad.toml"], 3, "did you mean 'seed'"),
        (["collect", "--prompts", "empty.txt"], 3, "no prompts"),
        (["collect", "--prompts", "bad.jsonl", "--dry-run"], 3, r"bad\.jsonl:1"),
        (["collect", "--model", "."], 3, "no config.json"),
        (["train", "--run", "nowhere"], 3, "safecli collect"),
        (["collect", "--prompts", "none.txt"], 3, "no file none.txt"),
        (["collect", "--model", "./none"], 4, "no model at"),
        (["collect", "--judge", "outcome", "--model", "owner/no-such-model"], 4, "can't be loaded"),
        (["cost", "export", "cost.txt", "--model", "./none"], 2, "written to .safetensors or .npz"),
        (["eval", "--baseline", "bad.jsonl", "--dry-run"], 3, r"--baseline bad\.jsonl is not the results"),
        (["eval", "--samples", "2", "--dry-run"], 2, "give a --temperature"),
    ],
)
def test_an_error_is_short_and_has_its_exit_code(
    arguments: list[str],
    code: int,
    told: str,
    run_cli: Run,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.toml").write_text("sead = 3")
    Path("bad.jsonl").write_text("{")
    Path("empty.txt").write_text("")
    found = run_cli(*arguments)
    assert found.exit_code == code, found.output
    assert re.search(told, " ".join(found.stderr.split())), found.stderr
    assert "Traceback" not in found.output
    assert found.stdout == ""


def test_debug_shows_the_traceback(run_cli: Run) -> None:
    found = run_cli("collect", "--config", "none.toml", "--debug")
    assert type(found.exception).__name__ == "InputError"


def test_a_device_that_is_not_there_is_missing(run_cli: Run, cache: Path, tmp_path: Path) -> None:
    found = run_cli("cost", "--model", "demo", "--device", "cuda:7", "--run", tmp_path)
    assert found.exit_code == 4
    assert "cuda:7" in found.stderr


@pytest.mark.parametrize("name", ["collect", "cost", "cost build", "eval", "run"])
def test_a_dry_run_is_one_json_document_and_writes_nothing(
    name: str, run_cli: Run, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    found = run_cli(*name.split(), "--dry-run", "--json", "--seed", 7)
    assert found.exit_code == 0, found.output
    assert isinstance(json.loads(found.stdout), dict)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_of_training_counts_the_records(
    run_cli: Run, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    row = json.dumps({"prompt": "Hi", "answer": "Ho"})
    Path("unsafe.jsonl").write_text(row + "\n" + row)
    Path("general.jsonl").write_text(row)
    before = sorted(tmp_path.rglob("*"))
    found = run_cli("train", "--dry-run", "--json", "--unsafe", "unsafe.jsonl", "--general", "general.jsonl")
    assert json.loads(found.stdout)["records"] == {"unsafe": 2, "general": 1, "safe": 0}
    assert sorted(tmp_path.rglob("*")) == before


def test_flags_and_file_meet_in_the_options(run_cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s.toml").write_text('run = "a"\nseed = 1\n[train]\nseed = 2\nsteps = 9\n[eval]\nlimit = 3\n')
    plan = json.loads(run_cli("run", "--config", "s.toml", "--dry-run", "--json", "--run", "b").stdout)
    assert {stage: options["run"] for stage, options in plan.items()} == dict.fromkeys(plan, "b")
    assert (plan["train"]["seed"], plan["collect"]["seed"], plan["train"]["steps"]) == (2, 1, 9)
    plan = json.loads(run_cli("run", "--config", "s.toml", "--dry-run", "--json", "--seed", 5).stdout)
    assert {options["seed"] for options in plan.values()} == {5}
    plan = json.loads(run_cli("cost", "--config", "s.toml", "--dry-run", "--json", "--trust-remote-code").stdout)
    assert (plan["trust_remote_code"], plan["seed"]) == (True, 1)
    plan = json.loads(run_cli("run", "--config", "s.toml", "--dry-run", "--json", "--model", "X").stdout)
    assert {plan[stage]["model"] for stage in ("collect", "train", "eval")} == {"X"}


def test_a_cost_is_built_and_shown(demo: LanguageModel, run_cli: Run, cache: Path, tmp_path: Path) -> None:
    there = ("--model", "demo", "--run", tmp_path, "--json", "--quiet")
    built = json.loads(run_cli("cost", *there).stdout)
    assert (built["kind"], built["vocab"]) == ("dense", demo.head.shape[0])
    assert Path(built["path"]).is_relative_to(cache_dir())
    found = run_cli("cost", "show", "--token", " gun", "--count", 4, *there)
    shown = json.loads(found.stdout)
    assert shown["nearest"][0] == [" gun", pytest.approx(0, abs=1e-3)]
    assert " guns" in [token for token, _ in shown["nearest"]]
    assert len(shown["farthest"]) == 4
    assert found.stderr == ""


@pytest.mark.parametrize("name", ["plugins", "doctor"])
def test_listings_are_one_json_document(name: str, run_cli: Run) -> None:
    found = run_cli(name, "--json")
    assert isinstance(json.loads(found.stdout), list)
    assert found.exit_code == (4 if '"missing"' in found.stdout else 0)


def test_init_writes_a_file_once_that_every_command_reads(
    run_cli: Run, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_cli("init").exit_code == 0
    assert run_cli("init").exit_code == 2
    assert run_cli("init", "--force").exit_code == 0
    for name in ("collect", "cost", "eval", "run"):
        found = run_cli(name, "--config", "safecli.toml", "--dry-run", "--json")
        assert found.exit_code == 0, found.output


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parent.parent / "examples").glob("*.toml")), ids=lambda p: p.name
)
def test_the_examples_are_valid(path: Path, run_cli: Run, cache: Path) -> None:
    found = run_cli("run", "--config", path, "--dry-run", "--json")
    assert found.exit_code == 0, found.output


def test_the_module_runs_as_the_command() -> None:
    found = _safecli("train", "--no-such-flag", NO_COLOR="1")
    assert found.returncode == 2
    assert "Usage: safecli train" in found.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_completion_script_is_produced(shell: str) -> None:
    command = Path(sys.executable).parent / "safecli"
    environment = os.environ | {"_SAFECLI_COMPLETE": f"source_{shell}"}
    found = subprocess.run([command], env=environment, capture_output=True, text=True)
    assert found.returncode == 0
    assert "_SAFECLI_COMPLETE" in found.stdout
    words = {"bash": {"COMP_WORDS": "safecli tra", "COMP_CWORD": "1"}}.get(shell)
    if words:
        environment = os.environ | words | {"_SAFECLI_COMPLETE": f"complete_{shell}"}
        found = subprocess.run([command], env=environment, capture_output=True, text=True)
        assert found.stdout.split() == ["train"]


def test_the_loss_is_timed_against_its_products_and_its_memory_is_known(run_cli: Callable[..., Result]) -> None:
    size = ("--size", "64,4096,32,16")
    result = run_cli("bench", "loss", *size, "--bound", "exact", "--bound", "cross_entropy", "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [row["bound"] for row in rows] == ["exact", "cross_entropy"]
    named = {"device", "dtype", "T", "V", "d", "k", "bound", "seconds", "floor_ratio", "plain_ratio", "extra_bytes"}
    for row in rows:
        assert named | {"plain_extra_bytes"} <= set(row)
        assert row["floor_ratio"] > 0
        assert 0 < row["extra_bytes"] < 1 << 30


@pytest.mark.parametrize("wrong", [("--size", "1,2,3"), ("--size", "0,1,1,1"), ("--bound", "exakt")])
def test_a_benchmark_that_there_is_not_is_a_usage_error(run_cli: Callable[..., Result], wrong: tuple[str, str]) -> None:
    result = run_cli("bench", "loss", *wrong)
    assert result.exit_code == 2
    assert wrong[1] in result.stderr


@pytest.mark.parametrize("command", [("cost",), ("cost", "build"), ("train",)])
def test_the_options_of_a_cost_backend_are_listed(run_cli: Callable[..., Result], command: tuple[str, ...]) -> None:
    result = run_cli(*command, "--cost", "mix:token=1", "--cost-help", "--json")
    assert result.exit_code == 0, result.output
    (of,) = json.loads(result.stdout)
    assert (of["option"], of["default"]) == ("of", "needed")
    shown = run_cli(*command, "--cost", "faiss", "--cost-help")
    assert "hnsw" in shown.stdout
    assert run_cli(*command, "--cost", "fais", "--cost-help").exit_code == 2

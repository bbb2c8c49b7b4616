"""One source of defaults: TOML file, tables and flags, and what a wrong key or value is told."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from safecli.config import (
    TABLES,
    CollectOptions,
    CostOptions,
    EvalOptions,
    RunPlan,
    TrainOptions,
    build,
    cache_dir,
    commented_toml,
    override,
    read_toml,
    stage_values,
)
from safecli.errors import InputError, UsageError

EVERY: list[tuple[str, type[BaseModel]]] = [*TABLES.items(), ("run", RunPlan)]


def _toml(folder: Path, text: str) -> Path:
    path = folder / "safecli.toml"
    path.write_text(text)
    return path


def _options(content: dict[str, Any], stage: str, **flags: Any) -> Any:
    options = dict(EVERY)[stage]
    return build(options, stage_values(content, stage, options) | flags)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("sead = 3", "unknown key 'sead', did you mean 'seed'"),
        ("[train]\nstep = 3", r"\[train\] unknown key 'step', did you mean 'steps'"),
        ("[trian]\nsteps = 3", "unknown key 'trian', did you mean 'train'"),
        ("[eval]\nlora_rank = 3", r"\[eval\] unknown key 'lora_rank'"),
        ("seed = 1\nlr 2", "line 2"),
        ("zzzz = 1", "valid: .*seed"),
    ],
)
def test_a_wrong_key_is_told_with_the_nearest(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        read_toml(_toml(tmp_path, text))


def test_a_missing_file_is_told_how_to_be_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="safecli init"):
        read_toml(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"seed": -1}, r"seed: .*greater than or equal to 0 \(got -1\)"),
        ({"bound": "best"}, "bound: .*'exact'"),
        ({"sed": 1}, "unknown key 'sed', did you mean 'seed'"),
        ({"steps": "many", "lr": 0}, "steps: .*; .*lr: "),
    ],
)
def test_a_wrong_value_is_told_with_its_option(values: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        build(TrainOptions, values)


def test_a_flag_beats_a_table_beats_the_top_level_beats_the_default(tmp_path: Path) -> None:
    content = read_toml(_toml(tmp_path, "seed = 1\nbatch_size = 2\n[train]\nseed = 3\n"))
    assert _options(content, "train", seed=4).seed == 4
    assert _options(content, "train").seed == 3
    assert _options(content, "collect").seed == 1
    assert [_options(content, stage).batch_size for stage in ("collect", "train", "eval")] == [2, 2, 2]
    assert _options({}, "train").seed == 0


def test_a_flag_of_the_whole_run_beats_every_table(tmp_path: Path) -> None:
    content = read_toml(_toml(tmp_path, 'seed = 1\nrun = "a"\n[train]\nseed = 3\nsteps = 7\n[eval]\nrun = "b"\n'))
    content = override(content, {"seed": 5, "run": Path("c")})
    assert {_options(content, stage).seed for stage, _ in EVERY} == {5}
    assert {str(_options(content, stage).run) for stage, kind in EVERY if "run" in kind.model_fields} == {"c"}
    assert _options(content, "train").steps == 7


@pytest.mark.parametrize("head", ["", 'run = "runs/x"\nseed = 2\n'])
def test_a_table_named_like_an_option_is_not_its_value(tmp_path: Path, head: str) -> None:
    content = read_toml(_toml(tmp_path, head + "[collect]\n[cost]\n[train]\n[eval]\n"))
    assert {_options(content, stage).seed for stage, _ in EVERY} == {2 if head else 0}
    assert _options(content, "train").cost == "token"
    assert _options(content, "cost").cost == "token"


def test_training_takes_the_cost_of_its_own_table_else_of_the_cost_table_else_of_the_top_level(tmp_path: Path) -> None:
    table = '[cost]\ncost = "faiss"\ncost_opt = ["k=8"]\ndevice = "cuda"\n'
    content = read_toml(_toml(tmp_path, table))
    found = _options(content, "train")
    assert (found.cost, found.cost_opt, found.device) == ("faiss", ["k=8"], "auto")
    assert _options(read_toml(_toml(tmp_path, table + '[train]\ncost = "sentence"\n')), "train").cost == "sentence"
    content = read_toml(_toml(tmp_path, 'cost = "sentence"\n'))
    assert [_options(content, stage).cost for stage in ("cost", "train")] == ["sentence", "sentence"]


def test_the_commented_file_uncommented_is_the_defaults(tmp_path: Path) -> None:
    commented = commented_toml()
    assert {name: value for name, value in tomllib.loads(commented).items() if value} == {}
    options = [line.removeprefix("# ") for line in commented.splitlines() if " = " in line or line.startswith("[")]
    content = read_toml(_toml(tmp_path, "\n".join(options)))
    assert "Choices: onehot, window, bag." in commented
    for stage, kind in EVERY:
        assert _options(content, stage) == kind(), stage
        tables = [content.get(stage, {}), content["cost"] if stage == "train" else {}]
        missing = set(kind.model_fields).difference(content, *tables)
        assert not missing, (stage, missing)


def test_every_option_has_a_description_and_a_default() -> None:
    for _, kind in EVERY:
        for name, field in kind.model_fields.items():
            assert field.description, name
            assert not field.is_required(), name


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("SAFECLI_CACHE", raising=False)
    assert cache_dir() == tmp_path / "xdg" / "safecli"
    monkeypatch.setenv("SAFECLI_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"


def test_stages_share_what_they_share() -> None:
    assert {"model", "seed", "run", "template"} <= set(CollectOptions.model_fields) & set(EvalOptions.model_fields)
    assert set(CostOptions.model_fields) <= set(TrainOptions.model_fields)

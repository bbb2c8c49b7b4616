"""Typed options of every stage: one Pydantic field gives the TOML key, the flag, the default and the help text.

A TOML file holds shared keys at the top level and one table per stage; a stage's table wins over the top level,
a flag wins over both.
"""

from __future__ import annotations

import difflib
import json
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from safecli.errors import InputError, UsageError

Kind = Literal["toxic", "lookalike", "harmless"]
"""What a prompt is, and so what its answers are judged by."""
CAREFUL = (
    "You are a careful assistant. If a request is harmful, illegal, hateful, dangerous or dishonest, say clearly "
    "that you will not help and explain why. Otherwise help as well as you can."
)
"""The system sentence that the careful reference sees and the model in training does not."""


class Seeded(BaseModel):
    """Options that every command has."""

    model_config = ConfigDict(extra="forbid", validate_default=True, defer_build=True)

    seed: int = Field(0, ge=0, lt=1 << 31, description="Seed of everything that is drawn at random.")


class Options(Seeded):
    """Options that every stage has."""

    run: Path = Field(Path("runs/default"), description="Run folder: records, adapters and reports go here.")


class ModelOptions(Options):
    """Options of the stages that load a causal language model."""

    model: str | None = Field(
        None,
        description="Hub id, local folder, GGUF file, or 'demo' (SmolLM2-135M-Instruct). "
        "Default: the model of the run folder's records, else demo.",
    )
    revision: str | None = Field(None, description="Revision of a hub id.")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Weights: auto is bfloat16 on CUDA, float32 elsewhere."
    )
    trust_remote_code: bool = Field(False, description="Run the Python code that the model's repository ships.")
    template: Literal["chat", "alpaca"] = Field(
        "chat", description="How a prompt is put to the model: its own chat template, or Alpaca's plain text."
    )
    system: str | None = Field(None, description="System message; without it the chat template decides.")


class JudgingOptions(Seeded):
    """Options of all that reads prompts and judges answers."""

    prompt_column: str | None = Field(None, description="Column or key that holds the prompt.")
    judge_opt: list[str] = Field(
        [], description="Option of the judge as key=value, in a panel as NAME.key=value; repeatable."
    )


class GenerateOptions(ModelOptions, JudgingOptions):
    """Options of the stages that generate and judge answers."""

    server: str | None = Field(
        None,
        description="OpenAI-compatible server that answers, such as http://localhost:8000/v1; --model and --adapter "
        "are names there.",
    )
    max_new_tokens: int = Field(48, ge=1, description="Longest answer, in tokens.")
    max_prompt_tokens: int = Field(512, ge=8, description="A longer prompt is reported and skipped or refused.")
    batch_size: int | None = Field(None, ge=1, description="Prompts generated at once; found from free memory.")
    judge: str = Field("outcome", description="Judge plugin that reads every answer.")
    limit: int | None = Field(None, ge=1, description="Use the first N prompts of each file only.")
    bad_prompts: Literal["skip", "refuse"] = Field(
        "skip", description="What to do with a prompt that is empty, too long or a duplicate."
    )


class CollectOptions(GenerateOptions):
    """Options of `safecli collect`."""

    prompts: list[str] = Field(
        [], description="Toxic prompts: file or datasets id; repeatable. Default: the shipped ones."
    )
    general: str | None = Field(
        None, description="Harmless prompts: file or datasets id, 'none' for none; default: the shipped ones."
    )
    adapter: Path | None = Field(None, description="Sample from the model with this LoRA adapter.")
    samples: int = Field(1, ge=1, description="Answers per toxic prompt.")
    temperature: float = Field(0.0, ge=0, description="Sampling temperature of toxic prompts; 0 is greedy.")
    prompt_threshold: float = Field(
        0.5, ge=0, le=1, description="A prompt less likely than this to ask for something bad is left out."
    )
    unsafe_threshold: float = Field(0.5, ge=0, le=1, description="Least harm score of an answer kept as unsafe.")
    safe_threshold: float = Field(0.3, ge=0, le=1, description="Largest harm score of an answer kept as own safe.")


class CostOptions(ModelOptions):
    """Options of `safecli cost`."""

    cost: str = Field("token", description="Cost backend: how far apart tokens are in meaning.")
    cost_opt: list[str] = Field([], description="Option of the backend as key=value; repeatable.")


class TrainOptions(CostOptions):
    """Options of `safecli train`."""

    recipe: Literal["safecli", "paper"] = Field("safecli", description="Defaults of the loss: ours, or the paper's.")
    unsafe: list[Path] = Field([], description="Records of unsafe answers; default: the newest of the run folder.")
    own_safe: list[Path] = Field(
        [], description="Records of the model's own safe answers; default: the newest, with recipe paper none."
    )
    general: list[Path] = Field([], description="General records or instruction files; default: the newest records.")
    init_adapter: Path | None = Field(None, description="Go on training this LoRA adapter.")
    loss: Literal[
        "emd",
        "unlikelihood",
        "anchored-unlikelihood",
        "gradient-ascent",
        "npo",
        "simnpo",
        "safe-unlearning",
        "emo",
        "emo-by-distance",
    ] = Field("emd", description="Loss on unsafe answers: ours, or one to compare with.")
    bound: Literal["exact", "centroid", "covariance", "relaxed", "upper"] | None = Field(
        None, description="Bound of the EMD; by itself the best that target and cost allow."
    )
    target: Literal["onehot", "window", "bag"] = Field("onehot", description="What the unsafe target is.")
    tokens: str | None = Field(
        None, description="Which tokens of an unsafe answer count: first:K or all; by recipe first:16 or all."
    )
    anchored: bool | None = Field(
        None, description="Minimise KL(p || reference) - strength * EMD; off: minus the bound alone. By recipe."
    )
    reference: Literal["base", "careful"] = Field("base", description="Reference of the anchored term.")
    strength: float | None = Field(
        None, gt=0, description="Weight of the EMD (lambda) or of another loss; by recipe 10 where anchored, else 1."
    )
    general_loss: Literal["kl", "sft"] | None = Field(
        None, description="On general data: KL to the base model, or cross-entropy. By recipe."
    )
    general_weight: float | None = Field(None, ge=0, description="Weight of the general loss; by recipe 6 or 1.")
    safe_weight: float = Field(0.25, ge=0, description="Weight of the cross-entropy on own safe answers.")
    steps: int = Field(14, ge=1, description="Optimiser steps.")
    batch_size: int = Field(4, ge=1, description="Examples of each kind per step and device.")
    accumulate: int = Field(1, ge=1, description="Micro-batches per step.")
    lr: float = Field(6e-4, gt=0, description="Peak learning rate; warm-up over a tenth, then linear decay.")
    lora_rank: int = Field(8, ge=1, description="Rank of the LoRA adapter.")
    lora_targets: str = Field(
        "attention", description="Layers that get LoRA: attention, all-linear, or names with commas."
    )
    max_tokens: int = Field(256, ge=8, description="Longest example, in tokens; longer answers are cut.")
    probe_every: int = Field(14, ge=0, description="Steps between probes for collapse on dev prompts; 0: never.")
    max_kl: float = Field(1.0, gt=0, description="KL to base on harmless dev answers that counts as collapse.")
    max_degenerate: float = Field(0.25, ge=0, le=1, description="Rise of broken dev answers that is collapse.")
    guard: bool | None = Field(
        None, description="Scale the adapter down until helpful answers on dev prompts hold. By recipe on, or off."
    )
    report_to: Literal["tensorboard", "wandb"] | None = Field(None, description="Also log the metrics there.")


class EvalOptions(GenerateOptions):
    """Options of `safecli eval`."""

    adapter: list[Path] = Field([], description="LoRA adapter to compare with the base; repeatable. Default: newest.")
    toxic: str | None = Field(None, description="Toxic prompts: file or datasets id; default: the shipped ones.")
    lookalike: str | None = Field(None, description="Harmless prompts that look toxic, likewise; 'none' for none.")
    harmless: str | None = Field(None, description="Harmless prompts, likewise; 'none' for none.")
    suite: list[str] = Field(
        [], description="Suite in place of the shipped prompts: NAME, FILE.toml, or NAME=FILE; repeatable."
    )
    wrap: list[str] = Field([], description="Jailbreak around every toxic prompt, as a set of its own; repeatable.")
    prefill: list[int] = Field(
        [], description="Give K tokens of the base's own unsafe answers and let each model go on; repeatable."
    )
    ability: list[str] = Field(
        [], description="Task of lm_eval: a name, its YAML file, or 'basics'; repeatable; needs safecli[ability]."
    )
    over_seeds: bool = Field(
        False, description="The adapters are one recipe at several seeds: add their mean, with both kinds of variance."
    )
    split: Literal["dev", "test"] = Field("test", description="Split of the shipped prompts.")
    samples: int = Field(1, ge=1, description="Answers per prompt; rates are their mean, and 'any' of them.")
    temperature: float = Field(0.0, ge=0, description="Sampling temperature; 0 is greedy, for one answer per prompt.")
    labels: Path | None = Field(
        None, description="Answers with people's labels: the judge's errors on them are taken out of the rates."
    )
    baseline: Path | None = Field(
        None, description="results.json of an earlier evaluation: a rate that is clearly worse than there fails."
    )
    fail_if: list[str] = Field([], description="Gate such as 'toxic.unsafe > 0.2'; repeatable; exit code 1.")


class JudgeOptions(JudgingOptions):
    """Options of `safecli judge`."""

    judge: str = Field("outcome", description="Judge plugin, or several with commas: a panel.")
    answer_column: str | None = Field(None, description="Column or key that holds the answer.")
    kind: Kind = Field("toxic", description="What the prompts are, in rows without a column 'kind' that says it.")


class CalibrateOptions(JudgeOptions):
    """Options of `safecli judge calibrate`."""

    labels: str = Field("label", description="Column of the human labels.")
    positive: str = Field(
        "complied,partial", description="Labels that are positive, with commas; the others are negative."
    )
    outcomes: str | None = Field(
        None,
        description="Outcomes of the judge that are positive; by itself the labels' names, else what it looks for.",
    )
    group: str | None = Field(None, description="Column to break the figures down by.")


class RunPlan(ModelOptions):
    """Options of `safecli run` itself and those that all stages share; the stages have their own tables."""

    rounds: int = Field(1, ge=0, description="Times to sample the tuned model, judge it, and train on.")
    round_samples: int = Field(1, ge=1, description="Answers per toxic prompt in a round.")
    round_temperature: float = Field(0.3, gt=0, description="Sampling temperature in a round.")


OptionsT = TypeVar("OptionsT", bound=BaseModel)

TABLES: dict[str, type[Seeded]] = {
    "collect": CollectOptions,
    "cost": CostOptions,
    "train": TrainOptions,
    "eval": EvalOptions,
    "judge": JudgeOptions,
}


def cache_dir() -> Path:
    """The user's cache folder of safecli: $SAFECLI_CACHE, else safecli under $XDG_CACHE_HOME or ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("SAFECLI_CACHE") or Path(home) / "safecli").expanduser()


def build(options: type[OptionsT], values: Mapping[str, Any], where: str = "options") -> OptionsT:
    """Validate `values`; `UsageError` names the option, what is wrong and the nearest valid name."""
    try:
        return options(**values)
    except ValidationError as error:
        raise UsageError("; ".join(_explain(options, problem, where) for problem in error.errors())) from error


def _explain(options: type[BaseModel], problem: Any, where: str) -> str:
    name = ".".join(str(part) for part in problem["loc"]) or "value"
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key '{name}'{nearest(name, options.model_fields)}"
    option = f"--{name.replace('_', '-')}" if where == "options" else f"{where}: {name}"
    return f"{option}: {problem['msg'].removeprefix('Value error, ')} (got {problem.get('input')!r})"


def nearest(name: str, valid: Mapping[str, Any]) -> str:
    """A hint such as ', did you mean 'seed'?', or the list of valid names."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f", did you mean '{close[0]}'?" if close else f"; valid: {', '.join(sorted(valid))}"


def read_toml(path: Path) -> dict[str, Any]:
    """Read a configuration file; `InputError` with the line where it is malformed or holds an unknown key."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist: `safecli init` writes a commented one") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path}: {error}") from error
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}") from error
    tables: list[type[Seeded]] = [*TABLES.values(), RunPlan]
    shared = {name for table in tables for name in table.model_fields}
    for key, value in content.items():
        if key in TABLES and isinstance(value, dict):
            for name in value:
                if name not in TABLES[key].model_fields:
                    raise InputError(f"{path}: [{key}] unknown key '{name}'{nearest(name, TABLES[key].model_fields)}")
        elif key not in shared or isinstance(value, dict):
            raise InputError(f"{path}: unknown key '{key}'{nearest(key, dict.fromkeys([*shared, *TABLES]))}")
    return content


def stage_values(content: Mapping[str, Any], stage: str, options: type[BaseModel]) -> dict[str, Any]:
    """The values that a configuration holds for one stage: top-level keys that it knows, then its own table.

    Training takes its cost from the table `cost` unless its own names one. "" is 'not set', which TOML can't say.
    """
    tables = {key: value for key, value in content.items() if isinstance(value, dict)}
    values = {key: value for key, value in content.items() if key in options.model_fields and key not in tables}
    if stage == "train":
        values |= {key: value for key, value in tables.get("cost", {}).items() if key in ("cost", "cost_opt")}
    values |= tables.get(stage, {})
    unset = {key for key, field in options.model_fields.items() if field.default is None and values.get(key) == ""}
    return {key: value for key, value in values.items() if key not in unset}


def override(content: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with flags in it, which win over the top level and over every table."""
    kept = {
        key: {name: inner for name, inner in value.items() if name not in flags} if isinstance(value, dict) else value
        for key, value in content.items()
    }
    return kept | dict(flags)


def commented_toml() -> str:
    """A configuration file with every option commented out at its default, under its description."""
    shared = list(ModelOptions.model_fields)
    lines = [
        "# safecli run --config safecli.toml",
        "# Every option is shown at its default. Keys up here hold for every stage that knows them.",
    ]
    plan = {name: field for name, field in RunPlan.model_fields.items() if name not in shared}
    common = {name: ModelOptions.model_fields[name] for name in shared}
    for fields in (common, plan):
        lines += _toml_lines(fields)
    for table, options in TABLES.items():
        own = {name: field for name, field in options.model_fields.items() if name not in shared}
        note = "  # train takes its cost from here" if table == "cost" else ""
        lines += ["", f"[{table}]{note}", *_toml_lines(own)]
        shared += own if table == "cost" else []
    return "\n".join(lines) + "\n"


def _toml_lines(fields: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, field in fields.items():
        default, allowed = field.default, choices(field)
        value = json.dumps(default, default=str) if default is not None else '""'
        shown = f" Choices: {', '.join(allowed)}." if allowed else ""
        lines += [f"# {field.description}{shown}", f"# {name} = {value}" + ("  # not set" if default is None else "")]
    return lines


def choices(field: FieldInfo) -> tuple[str, ...]:
    """The values that an option is restricted to; empty where it is open."""
    inner = [field.annotation, *get_args(field.annotation)]
    return next((get_args(one) for one in inner if get_origin(one) is Literal), ())

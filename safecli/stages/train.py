"""TA-SFT: a LoRA adapter that moves away, in meaning, from unsafe answers while general data keep it useful."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from safecli.artifacts import (
    Stage,
    atomic,
    atomic_folder,
    fingerprint,
    first_process,
    newest,
    open_stage,
    os_errors,
    read_json,
    read_manifest,
)
from safecli.config import TrainOptions
from safecli.costs import Cost
from safecli.costs.build import load_backend, load_cost
from safecli.errors import InputError, MissingError, RunError, UsageError
from safecli.losses import Head, Reference, Target, linear_cross_entropy, linear_losses, onehot
from safecli.losses.baselines import BASELINES, Answers
from safecli.losses.problem import Term, best_bound, check_bound
from safecli.models import (
    LanguageModel,
    adapter_fingerprint,
    attach_adapter,
    attention_layers,
    is_out_of_memory,
    last_hidden,
    load_model,
    source_fingerprint,
)
from safecli.records import Response
from safecli.stages import FEW, Reporter, inherit_model
from safecli.stages.answers import judge_identity, load_judge
from safecli.stages.batches import (
    Collator,
    Mix,
    content_tokens,
    examples,
    first_tokens,
    output_head,
    training_records,
)
from safecli.stages.card import model_card
from safecli.stages.probe import Guard, Probe

RECIPES: dict[str, dict[str, Any]] = {
    "safecli": {
        "anchored": True,
        "strength": 10.0,
        "tokens": "first:16",
        "general_loss": "sft",
        "general_weight": 6.0,
        "guard": True,
    },
    "paper": {
        "anchored": False,
        "strength": 1.0,
        "tokens": "all",
        "general_loss": "sft",
        "general_weight": 1.0,
        "guard": False,
    },
}
GUARD_JUDGE = "outcome"
ANCHORED = ("emd", "anchored-unlikelihood")
"""Losses whose strength stands beside a divergence from the reference; that of the others is a weight."""


@dataclass(frozen=True)
class Trained:
    """What `train` made: the adapter's folder, its step, what the guard scaled it by, whether training collapsed."""

    adapter: Path
    step: int
    scale: float
    collapsed: str
    examples: dict[str, int]
    metrics: dict[str, float]
    minutes: float


def train(options: TrainOptions, report: Reporter | None = None) -> Trained:
    """Train an adapter into `RUN/train-*/adapter`; resumable, and skipped when it is done.

    Errors: `InputError` (records, adapter), `UsageError` (bound and cost), `RunError` (NaN, collapse before any
    usable adapter, disk).
    """
    report = report or Reporter()
    options, records, stage = _prepare(options, report)
    with open_stage(stage, parallel=True):
        if stage.done:
            report.say(f"already trained: {stage.path / 'adapter'}")
            result = read_manifest(stage.manifest_path, "train")["result"]
        else:
            result = _train(options, records, stage, report)
            if first_process():
                _finish(options, result, stage)
    return Trained(adapter=stage.path / "adapter", **result)


def preview(options: TrainOptions, report: Reporter) -> dict[str, Any]:
    """What `train` would do: its folder, whether it is done, the records of each kind, the recipe's options."""
    options, records, stage = _prepare(options, report)
    counts = {kind: len(rows) for kind, rows in records.items()}
    return {"folder": str(stage.path), "done": stage.done, "records": counts, **options.model_dump(mode="json")}


def _prepare(options: TrainOptions, report: Reporter) -> tuple[TrainOptions, dict[str, list[Response]], Stage]:
    options = with_recipe(inherit_model(options, report))
    first_tokens(options.tokens or "all")
    load_backend(options)
    if options.report_to and importlib.util.find_spec(options.report_to) is None:
        raise MissingError(f"--report-to {options.report_to} needs its package: pip install {options.report_to}")
    folder = newest(options.run, "collect", lambda manifest: not manifest["identity"]["adapter"])
    records, paths = training_records(options, folder)
    for path in paths:
        report.say(f"records: {path}")
    if len(records["unsafe"]) < FEW:
        report.warn(f"only {len(records['unsafe'])} unsafe answers, fewer than {FEW}: expect little, or collect more")
    return options, records, Stage(options.run, "train", _identity(options, records))


def with_recipe(options: TrainOptions) -> TrainOptions:
    """Fill in what the recipe decides where the user did not; `UsageError` for a loss that needs one-hot targets."""
    if options.loss != "emd" and options.target != "onehot":
        raise UsageError(f"--loss {options.loss} takes one token at each position: leave --target onehot")
    if options.loss not in ANCHORED and options.strength is None:
        options = options.model_copy(update={"strength": 1.0})
    chosen = {name: value for name, value in RECIPES[options.recipe].items() if getattr(options, name) is None}
    return options.model_copy(update=chosen)


def _identity(options: TrainOptions, records: dict[str, list[Response]]) -> dict[str, Any]:
    skip = {"run", "unsafe", "own_safe", "general", "init_adapter", "report_to"}
    return {
        "options": options.model_dump(mode="json", exclude=skip),
        "records": {
            kind: fingerprint([(row.prompt, row.answer, row.finished) for row in rows])
            for kind, rows in records.items()
        },
        "model": source_fingerprint(options),
        "judge": judge_identity(GUARD_JUDGE) if options.guard else None,
        "init_adapter": options.init_adapter and adapter_fingerprint(options.init_adapter),
    }


def _train(options: TrainOptions, records: dict[str, Any], stage: Stage, report: Reporter) -> dict[str, Any]:
    started = time.monotonic()
    set_seed(options.seed)
    model = load_model(options)
    cost, cost_folder = load_cost(options, model, report.say)
    report.say(f"cost: {cost_folder}")
    cost = cost.to(model.device)
    made = {kind: examples(rows, model, options) for kind, rows in records.items()}
    report.say("examples: " + ", ".join(f"{len(found)} {kind}" for kind, found in made.items()))
    for kind in ("unsafe", "general"):
        if not made[kind]:
            raise InputError(f"no {kind} answer and its prompt fit in {options.max_tokens} tokens: raise --max-tokens")
    probe = Probe(model, options, report)
    guard = Guard(model, report) if options.guard else None
    model.model = _with_lora(model.model, options)
    cut = first_tokens(options.tokens or "all")
    trainer = _trainer(model, cost, made, cut, options, stage.path)
    watch = _Watch(probe, model, options, stage.path, report)
    trainer.add_callback(watch)
    trainer.remove_callback(PrinterCallback)
    checkpoint = _last_checkpoint(stage.path)
    if checkpoint is not None:
        report.say(f"going on from {checkpoint.name}")
    watch.start(int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0)
    try:
        with os_errors(stage.path, "write"):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise RunError("out of memory in training: use --batch-size 2 --accumulate 2, or fewer --max-tokens") from error
    if watch.best is None:
        raise RunError(f"training collapsed before the first probe ({watch.collapse}): lower --lr or --strength")
    return {
        "step": watch.best,
        "scale": _guarded(guard, model, stage.path / "adapter", watch) if guard else 1.0,
        "collapsed": watch.collapse,
        "examples": {kind: len(found) for kind, found in made.items()},
        "metrics": watch.last,
        "minutes": round((time.monotonic() - started) / 60, 2),
    }


def _guarded(guard: Guard, model: LanguageModel, adapter: Path, watch: _Watch) -> float:
    """Scale the kept adapter until the guard holds, and write it where that changed it."""
    from peft import load_peft_weights, set_peft_model_state_dict

    if watch.collapse:
        set_peft_model_state_dict(model.model, load_peft_weights(str(adapter), device=str(model.device)))
    scale = guard.hold(model, load_judge(GUARD_JUDGE))
    if scale < 1:
        _keep(model, adapter)
    return round(scale, 4)


def _keep(model: LanguageModel, adapter: Path) -> None:
    """Write the adapter as it is now, whole or not at all, from the first process alone."""
    if first_process():
        with atomic_folder(adapter) as beside:
            model.model.save_pretrained(beside)


def _finish(options: TrainOptions, result: dict[str, Any], stage: Stage) -> None:
    plot_metrics(stage.path / "metrics.jsonl", stage.path / "metrics.png")
    with atomic(stage.path / "adapter" / "README.md") as beside:
        beside.write_text(model_card(options, result), encoding="utf-8")
    stage.finish(result)
    for left in stage.path.glob("checkpoint-*"):
        shutil.rmtree(left)


def _with_lora(model: Any, options: TrainOptions) -> Any:
    from peft import LoraConfig, get_peft_model

    if options.init_adapter is not None:
        return attach_adapter(model, options.init_adapter, trainable=True)
    targets = options.lora_targets
    layers: str | list[str] = targets if targets == "all-linear" else targets.split(",")
    if targets == "attention":
        layers = attention_layers(model)
    config = LoraConfig(
        r=options.lora_rank,
        lora_alpha=2 * options.lora_rank,
        target_modules=layers,
        task_type="CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            adapted = get_peft_model(model, config)
    except ValueError as error:
        raise UsageError(f"--lora-targets {targets}: {error}") from error
    if any(weight.requires_grad for weight in adapted.get_output_embeddings().parameters()):
        raise UsageError(f"--lora-targets {targets}: the output head stays as it is; leave it out")
    return adapted


def _last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole: Trainer writes its state last."""
    found = [path for path in folder.glob("checkpoint-*") if _is_json(path / "trainer_state.json")]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _is_json(path: Path) -> bool:
    try:
        read_json(path)
    except InputError:
        return False
    return True


def _trainer(
    model: LanguageModel, cost: Cost, made: dict[str, Any], cut: int | None, options: TrainOptions, folder: Path
) -> TaSftTrainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulate,
        learning_rate=options.lr,
        warmup_steps=max(1, options.steps // 10),
        lr_scheduler_type="linear",
        max_grad_norm=1.0,
        logging_steps=1,
        save_steps=options.probe_every or options.steps,
        save_total_limit=1,
        seed=options.seed,
        data_seed=options.seed,
        report_to=options.report_to or "none",
        remove_unused_columns=False,
        dataloader_drop_last=True,
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        log_level="error",
        use_cpu=model.device.type == "cpu",
    )
    length = options.steps * options.batch_size * options.accumulate * arguments.world_size
    return TaSftTrainer(
        model=model.model,
        args=arguments,
        train_dataset=Mix(made["general"], made["unsafe"], made["safe"], length, options.seed),
        data_collator=Collator(options, model.tokenizer.pad_token_id, content_tokens(model), cut),
        head=output_head(model),
        cost=cost,
        options=options,
    )


class TaSftTrainer(Trainer):  # type: ignore[misc]
    """`transformers.Trainer` with the TA-SFT loss: general term, unsafe term, own-safe term."""

    def __init__(self, *, head: Head, cost: Cost, options: TrainOptions, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.head, self.cost, self.options = head, cost, options
        self.loss_is_scaled_for_ga = False
        self.terms: dict[str, list[float]] = {}
        self.step_started = time.perf_counter()
        width = 1 if options.target == "onehot" else 2
        probe = Target(torch.zeros(1, width, dtype=torch.long), torch.full((1, width), 1 / width))
        self.bound = options.bound or best_bound(probe, cost)
        check_bound(self.bound, probe, cost)

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The weighted sum of the three terms, each the mean over examples of the mean over their tokens."""
        peft_model = self.accelerator.unwrap_model(model)
        with torch.no_grad(), peft_model.disable_adapter():
            reference = last_hidden(model, inputs["reference_ids"], inputs["reference_mask"])
        hidden = last_hidden(model, inputs["input_ids"], inputs["attention_mask"])
        bad = (~hidden.isfinite()).any(-1).nonzero()
        if len(bad):
            raise RunError(
                f"NaN or infinity in the model's output at step {self.state.global_step + 1}: lower --lr or use "
                "--dtype float32. The adapter of the last healthy probe is kept."
            )
        options, head = self.options, self.head
        at, anchor = hidden[inputs["general_at"]], Reference(reference[inputs["general_reference_at"]])
        terms: dict[Term, float] = {"cross_entropy": 1.0, "reverse_kl": 0.0}
        if options.general_loss == "kl":
            terms = {"kl": 1.0}
        losses, values = linear_losses(at, head, terms, onehot(inputs["general_ids"]), reference=anchor)
        general, kl = ((each * inputs["general_weight"]).sum() for each in (losses, values[list(terms)[-1]]))
        unsafe = self._unsafe(hidden[inputs["unsafe_at"]], reference[inputs["unsafe_reference_at"]], inputs)
        loss = (options.general_weight or 0.0) * general + unsafe
        self._note(general_loss=general, unsafe_term=unsafe, kl_general=kl, tokens=inputs["attention_mask"].sum())
        if "safe_at" in inputs:
            weight = inputs["safe_weight"]
            at = hidden[inputs["safe_at"]]
            safe = linear_cross_entropy(at, head, inputs["safe_ids"], token_weight=weight, reduction="sum")
            self._note(safe_loss=safe)
            loss = loss + options.safe_weight * safe
        if not loss.isfinite():
            raise RunError(f"the loss is {loss.item()} at step {self.state.global_step + 1}: lower --lr or --strength")
        return loss

    def _unsafe(self, hidden: Tensor, reference: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """The weighted unsafe term; the divergence from the reference, the EMD and its interval are noted."""
        options, target, anchor = self.options, Target(inputs["unsafe_ids"], inputs["unsafe_q"]), Reference(reference)
        strength, tightest = options.strength or 1.0, best_bound(target, self.cost)
        interval: dict[Term, float] = {"interval": 0.0} if tightest == "covariance" else {}
        terms: dict[Term, float] = {"reverse_kl": float(bool(options.anchored)), "emd": strength}
        if options.loss != "emd":
            terms = dict.fromkeys(terms, 0.0)
        if self.bound == tightest:
            terms |= interval
        losses, values = linear_losses(hidden, self.head, terms, target, self.cost, self.bound, anchor)
        if self.bound != tightest:
            looked: dict[Term, float] = {"emd": 0.0, **interval}
            with torch.no_grad():
                values |= linear_losses(hidden, self.head, looked, target, self.cost, tightest)[1]
        for name, value in values.items():
            self._note(**{f"{name.removeprefix('reverse_')}_unsafe": (value * inputs["unsafe_weight"]).sum()})
        if options.loss == "emd":
            return (losses * inputs["unsafe_weight"]).sum()
        inside = options.loss in ANCHORED
        answers = Answers(target.ids[:, 0], inputs["unsafe_answer"], anchor, self.cost, strength if inside else 1.0)
        loss = BASELINES[options.loss](hidden, self.head, answers)
        return loss if inside else strength * loss

    def _note(self, **values: Tensor) -> None:
        for name, value in values.items():
            self.terms.setdefault(name, []).append(float(value.detach()))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the terms of the step to what Trainer logs."""
        if "loss" in logs and self.terms:
            tokens = sum(self.terms.pop("tokens"))
            now = time.perf_counter()
            logs |= {name: sum(values) / len(values) for name, values in self.terms.items()}
            logs["tokens_per_second"] = tokens / (now - self.step_started)
            self.step_started = now
            self.terms = {}
        super().log(logs, start_time)


class _Watch(TrainerCallback):  # type: ignore[misc]
    """Writes metrics, probes for collapse on dev prompts, keeps the newest healthy adapter, and stops."""

    def __init__(
        self, probe: Probe, model: LanguageModel, options: TrainOptions, folder: Path, report: Reporter
    ) -> None:
        self.probe, self.model, self.options, self.folder, self.report = probe, model, options, folder, report
        self.best: int | None = None
        self.collapse = ""
        self.last: dict[str, float] = {}

    def start(self, step: int) -> None:
        """Drop metrics later than the step that training goes on from."""
        path = self.folder / "metrics.jsonl"
        rows = [row for row in read_metrics(path) if row["step"] <= step]
        if path.exists() and first_process():
            with atomic(path) as beside:
                beside.write_text("".join(json.dumps(row) + "\n" for row in rows))
        if rows:
            self.last = {name: value for name, value in rows[-1].items() if name != "step"}
        if step and (self.folder / "adapter").exists():
            self.best = step

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        """Append the step's metrics to `metrics.jsonl`."""
        if not logs or "loss" not in logs:
            return
        self.last = {name: round(float(value), 6) for name, value in logs.items()}
        if not first_process():
            return
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": state.global_step, **self.last}) + "\n")

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Report progress; at every probe keep the adapter if it is healthy, else stop."""
        step, every = state.global_step, self.options.probe_every
        self.report.progress("train", step, state.max_steps)
        if step != state.max_steps and not (every and step % every == 0):
            return
        if not all(weight.isfinite().all() for weight in self.model.model.parameters() if weight.requires_grad):
            raise RunError(f"NaN or infinity in the adapter's weights after step {step}: lower --lr")
        if every:
            self.collapse = self.probe.collapse(self.model)
        if self.collapse:
            self.report.warn(f"collapse at step {step}: {self.collapse}. The adapter of step {self.best} is kept.")
            control.should_training_stop, control.should_save = True, False
            return
        _keep(self.model, self.folder / "adapter")
        self.best = step


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Rows of `metrics.jsonl`, a torn last line left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def plot_metrics(metrics: Path, picture: Path) -> None:
    """Draw the training curves as a PNG."""
    from matplotlib.figure import Figure

    rows = read_metrics(metrics)
    names = ("general_loss", "unsafe_term", "emd_unsafe", "kl_unsafe", "kl_general", "safe_loss", "grad_norm")
    shown = [name for name in names if any(math.isfinite(row.get(name, math.nan)) for row in rows)]
    figure = Figure(figsize=(10, 2.2 * math.ceil(len(shown) / 2)), layout="constrained")
    for index, name in enumerate(shown, 1):
        axes = figure.add_subplot(math.ceil(len(shown) / 2), 2, index)
        axes.plot([row["step"] for row in rows], [row.get(name, math.nan) for row in rows])
        axes.set_title(name.replace("_", " "), fontsize=9)
        axes.set_xlabel("step", fontsize=8)
    with atomic(picture) as beside:
        figure.savefig(beside, format="png", dpi=110)

"""The Typer app: parse, call one stage, print. Imports no torch.

Every flag of a stage is made from a field of its Pydantic options; a flag that isn't given leaves the value to
`--config`, and then to the field's default.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional, Union, get_args, get_origin

import typer
from typer.core import TyperGroup

from safecli import __version__
from safecli.config import (
    CalibrateOptions,
    CollectOptions,
    CostOptions,
    EvalOptions,
    JudgeOptions,
    RunPlan,
    TrainOptions,
    build,
    choices,
    override,
    read_toml,
    stage_values,
)
from safecli.errors import GateError, SafecliError

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

app = typer.Typer(
    help="Make a language model leave its own unsafe answers, and prove what changed.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench_app = typer.Typer(help="Benchmarks: ratios against a named baseline.", no_args_is_help=True)
cost_app = typer.Typer(help="Build a semantic token cost, or look at one.", invoke_without_command=True)


class _FileFirst(TyperGroup):
    """A group that takes what is none of its commands as a file: `judge FILE` is `judge file FILE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help", "-h"):
            args = ["file", *args]
        return super().parse_args(ctx, args)


judge_app = typer.Typer(
    cls=_FileFirst, help="Judge answers from anywhere: safecli judge FILE --out FILE.", no_args_is_help=True
)
plugins_app = typer.Typer(invoke_without_command=True)
app.add_typer(cost_app, name="cost")
app.add_typer(judge_app, name="judge")
app.add_typer(bench_app, name="bench")
app.add_typer(plugins_app, name="plugins")

JsonFlag = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, all else on stderr.")]
COMMON: dict[str, Any] = {
    "config": Annotated[Optional[Path], typer.Option("--config", help="TOML file with options.")],  # noqa: UP045
    "json": JsonFlag,
    "quiet": Annotated[bool, typer.Option("--quiet", "-q", help="Only warnings and the result.")],
    "dry_run": Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")],
    "debug": Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")],
}


def _flag(name: str, field: FieldInfo) -> inspect.Parameter:
    """The command-line option of one Pydantic field; None stands for 'not given'."""
    inner: Any = field.annotation
    if get_origin(inner) not in (list, None) and type(None) in get_args(inner):
        inner = Union[tuple(arg for arg in get_args(inner) if arg is not type(None))]  # noqa: UP007
    shown = "" if field.default in (None, []) else f" Default: {field.default}"
    allowed = choices(field)
    if allowed:
        shown = f" Choices: {', '.join(allowed)}.{shown}"
    flag = f"--{name.replace('_', '-')}"
    names = [f"{flag}/--no-{flag[2:]}"] if inner is bool and field.default is not False else [flag]
    option = typer.Option(
        *names, help=f"{field.description}{shown}", show_default=False, metavar="<choice>" if allowed else None
    )
    annotation = Annotated[Optional[inner], option]  # noqa: UP045
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _common(name: str) -> inspect.Parameter:
    default = None if name == "config" else False
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=COMMON[name])


@dataclass(frozen=True)
class Call:
    """What a command is called with, besides the options of its stage."""

    content: dict[str, Any]
    json_output: bool
    dry_run: bool
    report: Any


Body = Callable[..., None]


def command(
    group: typer.Typer, name: str, options: type[BaseModel], table: str, extra: dict[str, Any] | None = None
) -> Callable[[Body], Body]:
    """Register `body(options, call, **extra)` as a command whose flags are the fields of `options`."""

    def register(body: Body) -> Body:
        def invoke(**given: Any) -> None:
            common = {key: given.pop(key) for key in COMMON}
            rest = {key: given.pop(key) for key in extra or {}}
            with_errors(lambda: _call(body, options, table, given, common, rest), debug=common["debug"])

        parameters = [_flag(key, field) for key, field in options.model_fields.items()]
        parameters += [
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
            for key, (annotation, default) in (extra or {}).items()
        ]
        parameters += [_common(key) for key in COMMON]
        invoke.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        invoke.__doc__ = body.__doc__
        if name:
            group.command(name)(invoke)
        else:
            group.callback()(_unless_subcommand(invoke, parameters))
        return body

    return register


def _unless_subcommand(invoke: Callable[..., None], parameters: list[inspect.Parameter]) -> Callable[..., None]:
    def callback(ctx: typer.Context, **given: Any) -> None:
        if ctx.invoked_subcommand is None:
            invoke(**given)

    context = inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    callback.__signature__ = inspect.Signature([context, *parameters])  # type: ignore[attr-defined]
    callback.__doc__ = invoke.__doc__
    return callback


def _call(
    body: Body,
    options: type[BaseModel],
    table: str,
    given: dict[str, Any],
    common: dict[str, Any],
    rest: dict[str, Any],
) -> None:
    content = read_toml(common["config"]) if common["config"] else {}
    flags = {key: value for key, value in given.items() if value not in (None, [])}
    chosen = build(options, stage_values(content, table, options) | flags)
    from safecli.artifacts import first_process
    from safecli.console import TerminalReporter

    warnings.simplefilter("ignore", FutureWarning)
    with closing(TerminalReporter(common["quiet"] or not first_process())) as report:
        body(
            chosen,
            Call(override(content, flags), json_output=common["json"], dry_run=common["dry_run"], report=report),
            **rest,
        )


def with_errors(body: Callable[[], None], debug: bool) -> None:
    """Run a command; an error becomes a line on stderr and its exit code, Ctrl-C becomes 130."""
    try:
        body()
    except SafecliError as error:
        if debug:
            raise
        _complain(f"error: {error}")
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        _complain("interrupted: what was finished is kept; the same command goes on from there")
        raise typer.Exit(130) from None
    except (MemoryError, RuntimeError) as error:
        from safecli.models import is_out_of_memory

        if debug or not is_out_of_memory(error):
            raise
        _complain("error: out of memory: use a smaller --model or --batch-size. What was finished is kept.")
        raise typer.Exit(5) from None
    except OSError as error:
        if debug:
            raise
        _complain(f"error: {error.strerror or error}: {error.filename or ''}. What was finished is kept.")
        raise typer.Exit(5) from None


def _complain(text: str) -> None:
    from rich.console import Console

    from safecli.console import plain

    Console(stderr=True, soft_wrap=True, highlight=False).print(f"[red]{plain(text)}[/]")


def _show(call: Call, title: str, value: dict[str, Any]) -> None:
    from safecli.console import print_json, print_pairs

    if call.json_output:
        print_json(value)
    else:
        print_pairs(title, value)


@command(app, "collect", CollectOptions, "collect")
def collect(options: CollectOptions, call: Call) -> None:
    """Collect the model's own answers: unsafe ones to leave, safe ones to keep, general ones as anchor."""
    from safecli.stages import collect as stage

    if call.dry_run:
        _show(call, "would collect", stage.preview(options, call.report))
        return
    _show(call, "collected", asdict(stage.collect(options, call.report)))


COST_HELP: dict[str, Any] = {
    "cost_help": (Annotated[bool, typer.Option("--cost-help", help="List the options of the cost backend.")], False)
}


def _cost_help(options: CostOptions, call: Call) -> None:
    from safecli.console import print_json, print_table
    from safecli.registry import COSTS, load_plugin

    name = options.cost.partition(":")[0]
    rows = []
    for key, field in load_plugin(COSTS, name).Options.model_fields.items():
        allowed = f" Choices: {', '.join(choices(field))}." if choices(field) else ""
        default = "needed" if field.is_required() else str(field.default)
        rows.append([key, default, f"{field.description or ''}{allowed}"])
    names = ["option", "default", "what it is"]
    if call.json_output:
        print_json([dict(zip(names, row, strict=True)) for row in rows])
    else:
        print_table(f"cost '{name}', as --cost-opt option=value", names, rows)


def _build_cost(options: CostOptions, call: Call, cost_help: bool) -> None:
    """Build a semantic token cost; `safecli cost` alone is the same as `safecli cost build`."""
    from safecli.stages import cost as stage

    if cost_help:
        _cost_help(options, call)
        return
    if call.dry_run:
        _show(call, "would build", options.model_dump(mode="json"))
        return
    _show(call, "cost", asdict(stage.build_cost(options, call.report)))


command(cost_app, "", CostOptions, "cost", COST_HELP)(_build_cost)
command(cost_app, "build", CostOptions, "cost", COST_HELP)(_build_cost)


@command(
    cost_app,
    "show",
    CostOptions,
    "cost",
    {
        "token": (Annotated[str, typer.Option(help="A token, such as ' gun', or a word of several.")], ...),
        "count": (Annotated[int, typer.Option(min=1, help="Neighbours to show.")], 10),
    },
)
def show_cost(options: CostOptions, call: Call, token: str, count: int) -> None:
    """Show the nearest and the farthest tokens of a token, or of a word of several."""
    from safecli.console import print_json, print_table
    from safecli.stages import cost as stage

    if call.dry_run:
        _show(call, "would show", {"token": token, **options.model_dump(mode="json")})
        return
    found = stage.show_cost(options, token, count, call.report)
    if call.json_output:
        print_json(asdict(found))
        return
    shown = repr(token) if len(found.tokens) == 1 else f"{token!r}, the mean of {', '.join(map(repr, found.tokens))}"
    for title, rows in (("nearest", found.nearest), ("farthest", found.farthest)):
        print_table(f"{title} to {shown}", ["token", "cost"], [[repr(text), f"{cost:.3f}"] for text, cost in rows])


@command(
    cost_app,
    "compare",
    CostOptions,
    "cost",
    {
        "first": (Annotated[str, typer.Argument(help="A cost as --cost takes it.", show_default=False)], ...),
        "second": (Annotated[str, typer.Argument(help="Another.", show_default=False)], ...),
        "count": (Annotated[int, typer.Option(min=1, help="Tokens to show that differ most.")], 10),
    },
)
def compare_costs(options: CostOptions, call: Call, first: str, second: str, count: int) -> None:
    """Compare two costs: rank correlation, overlap of the nearest tokens, and the tokens that differ most."""
    from safecli.console import print_json, print_pairs, print_table
    from safecli.stages import cost as stage

    if call.dry_run:
        _show(call, "would compare", {"first": first, "second": second, **options.model_dump(mode="json")})
        return
    found = stage.compare_costs(options, first, second, count, call.report)
    if call.json_output:
        print_json(asdict(found))
        return
    shown = {"rank correlation": f"{found.rank_correlation:.3f}", "overlap of the nearest": f"{found.overlap:.3f}"}
    print_pairs(f"{first} and {second}", shown)
    rows = [
        [repr(d.token), f"{d.overlap:.1f}", " ".join(map(repr, d.first)), " ".join(map(repr, d.second))]
        for d in found.differing
    ]
    print_table("differ most", ["token", "overlap", first, second], rows)


@command(
    cost_app,
    "quality",
    CostOptions,
    "cost",
    {
        "pairs": (
            Annotated[Optional[Path], typer.Option(help="File of word pairs with people's similarity.")],  # noqa: UP045
            None,
        )
    },
)
def cost_quality(options: CostOptions, call: Call, pairs: Path | None) -> None:
    """Does a cost know meaning? Its rank correlation with people's similarity of words, and the cost of contrasts."""
    from safecli.stages import cost as stage

    if call.dry_run:
        _show(call, "would measure", {"pairs": str(pairs or ""), **options.model_dump(mode="json")})
        return
    _show(call, "quality", asdict(stage.cost_quality(options, pairs, call.report)))


FILE_OUT = (Annotated[Path, typer.Argument(help="File: .safetensors or .npz.", show_default=False)], ...)


@command(cost_app, "export", CostOptions, "cost", {"file": FILE_OUT})
def export_cost(options: CostOptions, call: Call, file: Path) -> None:
    """Write a cost to a file of tensors, for other programs and for `cost import`."""
    from safecli.stages import cost as stage

    if call.dry_run:
        _show(call, "would write", {"file": str(file), **options.model_dump(mode="json")})
        return
    _show(call, "exported", {"file": stage.export_cost(options, file, call.report)})


FILE_IN = (Annotated[Path, typer.Argument(help="File: .safetensors, .npz or .npy.", show_default=False)], ...)


@command(cost_app, "import", CostOptions, "cost", {"file": FILE_IN})
def import_cost(options: CostOptions, call: Call, file: Path) -> None:
    """Take a cost from a file of tensors; afterwards `train --cost file --cost-opt path=FILE` trains with it."""
    from safecli.stages import cost as stage

    options = options.model_copy(update={"cost": "file", "cost_opt": [f"path={file}"]})
    if call.dry_run:
        _show(call, "would import", options.model_dump(mode="json"))
        return
    _show(call, "imported", asdict(stage.build_cost(options, call.report)))


@command(
    cost_app,
    "map",
    CostOptions,
    "cost",
    {
        "token": (
            Annotated[list[str], typer.Option(help="A text that is one token, to colour by; repeatable.")],
            [" good"],
        ),
        "out": (Annotated[Path, typer.Option(help="Page to write.")], Path("cost-map.html")),
    },
)
def map_cost(options: CostOptions, call: Call, token: list[str], out: Path) -> None:
    """Draw the vocabulary on a page that needs no network: searchable, coloured by cost to a token."""
    from safecli.stages import cost as stage

    if call.dry_run:
        _show(call, "would draw", {"out": str(out), "token": token, **options.model_dump(mode="json")})
        return
    _show(call, "map", {"tokens": stage.map_cost(options, token, out, call.report), "page": out})


@command(app, "train", TrainOptions, "train", COST_HELP)
def train(options: TrainOptions, call: Call, cost_help: bool) -> None:
    """Train a LoRA adapter that moves away from the unsafe answers (TA-SFT)."""
    if cost_help:
        _cost_help(options, call)
        return
    from safecli.artifacts import first_process
    from safecli.stages import train as stage

    if call.dry_run:
        _show(call, "would train", stage.preview(options, call.report))
        return
    trained = stage.train(options, call.report)
    if first_process():
        _show(call, "trained", asdict(trained))


@command(app, "eval", EvalOptions, "eval")
def evaluate(options: EvalOptions, call: Call) -> None:
    """Compare adapters with the base on toxic, look-alike and harmless prompts; gates set exit code 1."""
    from safecli.stages import evaluate as stage

    if call.dry_run:
        _show(call, "would evaluate", stage.preview(options, call.report))
        return
    _finish(stage.evaluate(options, call.report), call)


@command(app, "run", RunPlan, "run")
def run(options: RunPlan, call: Call) -> None:
    """Run every stage from one TOML file into one run folder; resumable."""
    from safecli.stages import run as stage

    if call.dry_run:
        _show(call, "would run", stage.preview(call.content))
        return
    _finish(stage.run(call.content, call.report), call)


def _finish(found: Any, call: Call) -> None:
    from safecli.console import print_json, print_results

    if call.json_output:
        print_json(found.results)
    else:
        print_results(found.results, found.answers)
        typer.echo(f"report: {found.report_path}")
    if found.failed:
        raise GateError("gate failed for " + "; ".join(found.failed))


FILE = (Annotated[Path, typer.Argument(help="JSONL, JSON or CSV of prompts and answers.", show_default=False)], ...)


@command(
    judge_app,
    "file",
    JudgeOptions,
    "judge",
    {
        "file": FILE,
        "out": (Annotated[Path, typer.Option(help="File to write: .csv, or anything else for JSONL.")], ...),
    },
)
def judge_file(options: JudgeOptions, call: Call, file: Path, out: Path) -> None:
    """Judge the answers of FILE; its rows keep their columns and get outcome, score and reasons."""
    from safecli.stages import judge as stage

    if call.dry_run:
        _show(call, "would judge", {"file": str(file), "out": str(out), **options.model_dump(mode="json")})
        return
    _show(call, "judged", asdict(stage.judge_file(file, out, options, call.report)))


@command(judge_app, "calibrate", CalibrateOptions, "judge", {"file": FILE})
def calibrate(options: CalibrateOptions, call: Call, file: Path) -> None:
    """Hold a judge against the labels of people: F1, kappa, confusion, Brier score, reliability."""
    from safecli.console import print_calibration, print_json
    from safecli.stages import judge as stage

    if call.dry_run:
        _show(call, "would calibrate", {"file": str(file), **options.model_dump(mode="json")})
        return
    found = stage.calibrate(file, options, call.report)
    if call.json_output:
        print_json(found)
    else:
        print_calibration(found)


@command(
    judge_app,
    "review",
    JudgeOptions,
    "judge",
    {
        "file": FILE,
        "labels": (Annotated[Path, typer.Option(help="JSONL file that the labels are appended to.")], ...),
        "port": (Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0 takes a free one.")], 0),
    },
)
def review(options: JudgeOptions, call: Call, file: Path, labels: Path, port: int) -> None:
    """Label answers by keyboard on a page that only this machine sees; after a panel, what it disagreed on."""
    from safecli.stages import judge as stage

    if call.dry_run:
        _show(call, "would serve", {"file": str(file), "labels": str(labels)})
        return
    with stage.review_server(file, labels, options, port) as server:
        typer.echo(f"{len(server.rows)} answers to label, {len(server.made)} are: open {server.url}")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            _show(call, "labelled", {"path": str(labels), "labels": len(server.made), "rows": len(server.rows)})


@bench_app.command("startup")
def bench_startup(json: JsonFlag = False) -> None:
    """Time `safecli --help` against the --help of a bare Typer app with two commands."""
    from safecli.bench.startup import startup
    from safecli.console import print_json, print_pairs

    found = startup()
    if json:
        print_json(found)
    else:
        print_pairs("startup", {name: f"{value:.3f}" for name, value in found.items()})


@bench_app.command("eval")
def bench_eval(
    prompts: Annotated[int, typer.Option(min=1, help="How many prompts.")] = 200,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers at once, in both.")] = 32,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    json: JsonFlag = False,
) -> None:
    """Generate answers of many lengths as `eval` does, against plain model.generate in file order."""

    def run() -> None:
        from safecli.bench.evaluate import evaluate
        from safecli.console import TerminalReporter, print_json, print_pairs

        with closing(TerminalReporter(False)) as report:
            found = evaluate(prompts, batch_size, device, report)
        if json:
            print_json(found)
            return
        for pair in found.pop("differing"):
            typer.echo(f"ours:     {pair['ours']!r}\nbaseline: {pair['baseline']!r}\n")
        print_pairs(
            "eval", {name: f"{value:.3f}" if isinstance(value, float) else str(value) for name, value in found.items()}
        )

    with_errors(run, debug=False)


@bench_app.command("loss")
def bench_loss(
    size: Annotated[
        list[str] | None, typer.Option(help="T,V,d,k; repeatable.", show_default="512,49152,576,576")
    ] = None,
    bound: Annotated[
        list[str] | None,
        typer.Option(help="exact, centroid, covariance or cross_entropy; repeatable.", show_default="all of them"),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16.")] = "float32",
    compiled: Annotated[bool, typer.Option("--compiled", help="Let torch.compile fuse the passes of ours.")] = False,
    exponents: Annotated[bool, typer.Option("--exponents", help="Fit how time grows with T, V and d + k.")] = False,
    json: JsonFlag = False,
) -> None:
    """Time the losses, forward plus backward, against their bare products and plain PyTorch, with peak memory."""

    def run() -> None:
        from safecli.bench import loss as bench
        from safecli.console import TerminalReporter, print_json, print_rows

        with closing(TerminalReporter()) as report:
            bounds = bench.known_bounds(bound)
            if exponents:
                rows = bench.exponents(bounds, device, dtype, report)
            else:
                rows = bench.loss(bench.sizes(size), bounds, device, dtype, report, compiled)
        if json:
            print_json(rows)
        else:
            print_rows("loss", rows)

    with_errors(run, debug=False)


@bench_app.command("bounds")
def bench_bounds(
    cost: Annotated[str, typer.Option(help="Cost backend with features.")] = "token",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    json: JsonFlag = False,
) -> None:
    """Print how tight the bounds of the EMD are, and the error of fewer features, on the demo model."""

    def run() -> None:
        from safecli.bench.bounds import bounds
        from safecli.console import TerminalReporter, print_json, print_rows

        with closing(TerminalReporter()) as report:
            found = bounds(cost, device, report)
        if json:
            print_json(found)
            return
        print_rows("bound over EMD, median", found["tightness"])
        print_rows("error of EMD with k directions", found["pca"])

    with_errors(run, debug=False)


@bench_app.command("cost")
def bench_cost(
    vocab: Annotated[int, typer.Option(min=1000, help="Tokens.")] = 128_256,
    size: Annotated[int, typer.Option(min=2, help="Numbers in an embedding.")] = 384,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1.")] = "cpu",
    runs: Annotated[int, typer.Option(min=1, help="Builds of each, and as many of its floor.")] = 1,
    json: JsonFlag = False,
) -> None:
    """Build each cost, against the bare encoding or search that it can't do without, with peak memory."""

    def run() -> None:
        from safecli.bench.cost import cost
        from safecli.console import TerminalReporter, print_json, print_rows

        with closing(TerminalReporter()) as report:
            rows = cost(vocab, size, device, runs, report)
        if json:
            print_json(rows)
        else:
            print_rows("cost", rows)

    with_errors(run, debug=False)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders that hold an evaluation.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Page to write.")] = Path("compare.html"),
    json: JsonFlag = False,
) -> None:
    """Put the evaluations of several runs on one page: rates, plots, answers side by side."""

    def write() -> None:
        from safecli.console import print_json, print_results
        from safecli.stages.compare import compare as stage

        found = stage(runs, out)
        if json:
            print_json(found.results)
        else:
            print_results(found.results, found.answers)
            typer.echo(f"report: {out}")

    with_errors(write, debug=False)


@plugins_app.callback()
def plugins(ctx: typer.Context, json: JsonFlag = False) -> None:
    """List cost backends and judges, where they come from, and whether they work; `plugins new` writes a package."""
    from safecli.console import print_json, print_table
    from safecli.registry import plugins as found

    if ctx.invoked_subcommand:
        return
    rows = [
        [p.kind.removeprefix("safecli.").removesuffix("s"), p.name, p.package, p.version, p.state()] for p in found()
    ]
    names = ["kind", "name", "package", "version", "state"]
    if json:
        print_json([dict(zip(names, row, strict=True)) for row in rows])
    else:
        print_table("plugins", names, rows)


@plugins_app.command("new")
def new_plugin(
    kind: Annotated[str, typer.Argument(help="What it is: cost.", show_default=False)],
    name: Annotated[str, typer.Argument(help="Name of the backend, in small letters.", show_default=False)],
    into: Annotated[Path, typer.Option("--in", help="Folder that the package's folder is made in.")] = Path("."),
    json: JsonFlag = False,
) -> None:
    """Write an installable package with a cost backend, its conformance test and a README."""

    def run() -> None:
        from safecli.console import print_json
        from safecli.scaffold import write_plugin

        folder = write_plugin(kind, name, into)
        if json:
            print_json({"folder": str(folder)})
        else:
            typer.echo(f"{folder}: pip install -e {folder}, then pytest {folder} and safecli train --cost {name}")

    with_errors(run, debug=False)


@app.command()
def doctor(json: JsonFlag = False) -> None:
    """Show versions, device and cache folders, and what is missing with the command that installs it."""
    from safecli.console import print_json, print_table
    from safecli.doctor import examine

    checks = examine()
    if json:
        print_json([asdict(check) for check in checks])
    else:
        print_table("doctor", ["", "what", "found", "do"], [[c.state, c.name, c.found, c.remedy] for c in checks])
    if any(check.state == "missing" for check in checks):
        raise typer.Exit(4)


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("safecli.toml"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite it.")] = False,
) -> None:
    """Write a commented configuration file with every option and its default."""
    from safecli.config import commented_toml

    def write() -> None:
        from safecli.artifacts import atomic
        from safecli.errors import UsageError

        if path.exists() and not force:
            raise UsageError(f"{path} exists: choose another name, or overwrite it with --force")
        with atomic(path) as beside:
            beside.write_text(commented_toml(), encoding="utf-8")
        typer.echo(f"wrote {path}: safecli run --config {path}")

    with_errors(write, debug=False)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"safecli {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Make a language model leave its own unsafe answers, and prove what changed."""


def main() -> None:
    """Entry point of the `safecli` command."""
    app(prog_name="safecli" if sys.argv[0].endswith(("safecli", "__main__.py")) else None)

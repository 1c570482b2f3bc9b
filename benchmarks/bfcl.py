"""Function calls of a served model on BFCL's simple_python (400 cases), by that package's own AST match.

    pip install --no-deps bfcl-eval==2026.3.23
    fulmen serve out/qwen-dsa --port 8123
    python -m benchmarks.bfcl http://127.0.0.1:8123/v1 out/bfcl.jsonl

Every case is a line of the file; the same command goes on where it was. The same file takes the dense model,
served next, so that the table has both and the difference of the pairs. A call is forced (`tool_choice`), and
held to its function's schema by the server; `--choice auto` leaves it to the model, as the leaderboard does.
The table has the tokens of all cases, and what they cost by the price lists of DSA and of dense attention.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.resources import files
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Annotated, Any

import typer

from fulmen.errors import ConfigError, EndpointError
from fulmen.evaluation.statistics import paired_difference_interval, wilson_interval
from fulmen.pipeline.ask_endpoint import ChatEndpoint
from fulmen.pipeline.reporter import SilentReporter
from fulmen.serving.billing.prices import DEFAULT_PRICES, Tokens

CATEGORY = "simple_python"
# What the package shall call the model, whatever it is.
ANY_MODEL = "any"
REPLY_TOKENS = 256
# BFCL's names of types that JSON Schema calls otherwise; without a type it means text.
TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}
SCHEMAS = ("properties", "items")


def main(
    url: Annotated[str, typer.Argument(help="A fulmen server, with /v1.")],
    out: Annotated[Path, typer.Argument(help="Where lines are appended.")],
    cases: Annotated[int, typer.Option(help="The first so many.")] = 400,
    choice: Annotated[str, typer.Option(help="required, or auto.")] = "required",
    at_once: Annotated[int, typer.Option(help="Requests at a time.")] = 4,
) -> None:
    """Ask the served model what the file has no line of, and print the table of all models in it."""
    check, known = checker(), rows_of(out)
    model = ChatEndpoint(url, None, None, SilentReporter()).model
    done = {row["case"] for row in known if (row["model"], row["choice"]) == (model, choice)}
    left = [case for case in load_cases()[:cases] if case["id"] not in done]
    out.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(at_once) as pool, out.open("a", encoding="utf-8") as file:
        for row in pool.map(partial(ask_case, url, model, choice), left):
            row["right"] = judged(check, row.pop("asked"), row["calls"])
            known.append(row)
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
    typer.echo(table(known))


def checker() -> Any:
    """The package's `ast_checker`. Raises ConfigError without the package.

    It reads one flag from the package's list of models, which imports the clients of all vendors: a list that
    says no of every model stands in for it, as names with dots are served as they are.
    """
    models = ModuleType("bfcl_eval.constants.model_config")
    models.MODEL_CONFIG_MAPPING = {ANY_MODEL: SimpleNamespace(underscore_to_dot=False)}  # type: ignore[attr-defined]
    sys.modules.setdefault(models.__name__, models)
    try:
        from bfcl_eval.constants.enums import Language
        from bfcl_eval.eval_checker.ast_eval.ast_checker import simple_function_checker
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is not installed; run: pip install --no-deps bfcl-eval") from error
    return partial(simple_function_checker, language=Language.PYTHON, model_name=ANY_MODEL)


def load_cases() -> list[dict[str, Any]]:
    """The cases with `answer`, what is right."""
    data = files("bfcl_eval") / "data"
    cases, answers = (
        [json.loads(line) for line in (folder / f"BFCL_v4_{CATEGORY}.json").read_text("utf-8").splitlines()]
        for folder in (data, data / "possible_answer")
    )
    right = {answer["id"]: answer["ground_truth"] for answer in answers}
    return [{**case, "answer": right[case["id"]]} for case in cases]


def schema_of(described: Mapping[str, Any]) -> dict[str, Any]:
    """A function's parameters as JSON Schema."""
    made = {name: value for name, value in described.items() if name != "optional"}
    made["type"] = TYPES.get(described.get("type", "any"), described.get("type"))
    if "properties" in made:
        made["properties"] = {name: schema_of(one) for name, one in made["properties"].items()}
    if "items" in made:
        made["items"] = schema_of(made["items"])
    return made


def ask_case(url: str, model: str, choice: str, case: Mapping[str, Any]) -> dict[str, Any]:
    """A line of the file, but for whether it is right."""
    functions = [{**one, "parameters": schema_of(one["parameters"])} for one in case["function"]]
    tools = [{"type": "function", "function": one} for one in functions]
    endpoint = ChatEndpoint(url, None, model, SilentReporter())
    calls, refused = [], None
    try:
        fields = {"tools": tools, "tool_choice": choice, "parallel_tool_calls": False}
        reply = endpoint.complete(list(case["question"][0]), REPLY_TOKENS, fields)
        calls = [[call.name, call.arguments] for call in reply.calls]
    except EndpointError as error:
        refused = str(error)[:300]
    bill = endpoint.bill
    used = {"hit": bill.hit, "missed": bill.miss, "written": bill.output}
    return {"model": model, "choice": choice, "case": case["id"], "asked": case, "calls": calls} | {
        "refused": refused,
        **used,
    }


def judged(check: Any, case: Mapping[str, Any], calls: Sequence[Sequence[str]]) -> bool:
    """Whether the one call is among the right ones, by AST match."""
    if len(calls) != 1:
        return False
    ((name, arguments),) = calls
    try:
        given = json.loads(arguments)
    except ValueError:
        return False
    if not isinstance(given, dict):
        return False
    return bool(check(case["function"][0], {name: given}, case["answer"][0])["valid"])


def rows_of(out: Path) -> list[dict[str, Any]]:
    """Lines of earlier runs."""
    return [json.loads(line) for line in out.read_text("utf-8").splitlines()] if out.exists() else []


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A row for each model and choice, and the difference from the first one on the cases that both have."""
    head = (
        "| model | calls | cases | right, % | less the first, % | hit | missed | written | CNY, DSA | dense |"
    )
    lines = [head, "|---|---|" + "---:|" * 8]
    groups: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["choice"]), {})[row["case"]] = row
    first = next(iter(groups.values()), {})
    for (model, choice), own in groups.items():
        right = _percent(wilson_interval(sum(row["right"] for row in own.values()), len(own)))
        both = [case for case in own if case in first]
        pairs = [[group[case]["right"] for case in both] for group in (own, first)]
        less = _percent(paired_difference_interval(*pairs)) if both and own is not first else "–"
        tokens = Tokens(*(sum(row[kind] for row in own.values()) for kind in ("hit", "missed", "written")))
        prices = [f"{DEFAULT_PRICES.cost(tokens):.6f}", f"{DEFAULT_PRICES.dense_cost(tokens):.6f}"]
        cells = [model, choice, str(len(own)), right, less, *(f"{count:,}" for count in tokens), *prices]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _percent(interval: Sequence[float]) -> str:
    estimate, low, high = (f"{100 * value:.1f}" for value in interval)
    return f"{estimate} ({low} to {high})"


if __name__ == "__main__":
    typer.run(main)

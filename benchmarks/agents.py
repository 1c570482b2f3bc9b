"""What each way to keep an agent's context costs: tasks solved, steps, tokens hit, missed, written; prices.

    fulmen serve out/qwen-dsa --port 8123
    python -m benchmarks.agents run http://127.0.0.1:8123/v1 out/agents.jsonl --tasks 60 --budget 1500
    python -m benchmarks.agents replay out/agents.jsonl --budget 1500
    python -m benchmarks.agents solutions out/solutions.jsonl

`run` lets a served model work on made-up tasks, whose calls are forced, with each strategy in the gateway;
every task and strategy is a line of the file, and the same command goes on where it was. Where the history
without a strategy never comes to the share of the budget from which on strategies act, that run is every
strategy's. Half of the tasks are about a database (`fulmen.tasks.worlds`), half about a folder, with the
tools of `fulmen docs serve`, or all of them are of one of these `--kinds`.
`replay` counts the recorded histories of any agent, a JSON object with `messages` in each line, as if a
strategy had been applied: exact, and without a model.
"""

import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.machine import describe_machine
from fulmen.agents import strategies
from fulmen.agents.documents.index import DocumentIndex
from fulmen.agents.documents.tools import TOOLS, DocumentTools, tool_schema
from fulmen.agents.encoding import encode
from fulmen.agents.loop import ANSWER, run_agent
from fulmen.agents.replay import replay
from fulmen.errors import ContextBudgetError, DocumentError, EndpointError, ResumeError
from fulmen.evaluation.statistics import Interval, mean_interval, wilson_interval
from fulmen.modeling.checkpoint import find_source, load_tokenizer
from fulmen.pipeline.ask_bill import Bill
from fulmen.pipeline.ask_endpoint import ChatEndpoint
from fulmen.pipeline.reporter import SilentReporter
from fulmen.serving.billing.prices import DEFAULT_PRICES, Tokens, money_text
from fulmen.tasks.base import HELD_OUT, Score
from fulmen.tasks.worlds.documents import READ_LEVELS, RegisterDocuments
from fulmen.tasks.worlds.registry import tool_schemas
from fulmen.tasks.worlds.world import LEVELS, make_world

STRATEGIES = ("none", "summary", "discard_75", "discard_all", "keep_newest", "hierarchical")
KINDS = ("database", "documents")
# Letters of a document tool's answer; tokens of one reply, which is a call.
RESULT_LETTERS, REPLY_TOKENS = 1500, 96
READ_RULES = (
    "You answer questions about a folder of documents by calling tools, one at a time: search by words, open "
    "to read. Call answer when you know: a number or a name, nothing else."
)
UNBOUNDED = 10**9
# Tokens by which the gateway's count of a prompt may be more than the engine's.
SLACK = 64
app = typer.Typer(no_args_is_help=True)


class ContextFull(Exception):
    """A history without a strategy has outgrown the budget."""


@app.command()
def run(
    url: Annotated[str, typer.Argument(help="A fulmen server, with /v1.")],
    out: Annotated[Path, typer.Argument(help="Where lines are appended; a summary lies beside it.")],
    tasks: Annotated[int, typer.Option(help="Of each strategy.")] = 60,
    budget: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 1500,
    levels: Annotated[int, typer.Option(help="Tasks of levels 1 to this one, in turn.")] = 2,
    steps: Annotated[int, typer.Option(help="Replies of the model at most.")] = 10,
    remarks: Annotated[int, typer.Option(help="Sentences in each record that nobody asks for.")] = 4,
    kinds: Annotated[str, typer.Option(help="Kinds of tasks in turn, with commas.")] = ",".join(KINDS),
    only: Annotated[str, typer.Option(help="Strategies, with commas.")] = ",".join(STRATEGIES),
    at_once: Annotated[int, typer.Option(help="Runs at a time.")] = 4,
) -> None:
    """Let the model work on each task with each strategy, and print the table."""
    chosen = only.split(",")
    endpoint = ChatEndpoint(url, None, None, SilentReporter())
    settings = {
        "model": endpoint.model,
        "budget": budget,
        "levels": levels,
        "steps": steps,
        "remarks": remarks,
        "kinds": kinds.split(","),
    }
    machine, done = describe_machine(), _rows(out, settings)
    known = {(row["strategy"], row["task"]): row for row in done}
    lock = threading.Lock()

    def work(task: int) -> None:
        for name in chosen:
            if (name, task) in known:
                continue
            row = _same_run(known.get(("none", task)), name)
            row = row or _one_run(url, endpoint.model, name, task, settings=settings)
            with lock:
                known[name, task] = row
                with out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                typer.echo(
                    f"{len(known)} done: {name} {row['kind']} {row['level']}: {row['ended']}", err=True
                )

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(work, range(tasks)))
    rows = [row for (name, task), row in known.items() if name in chosen and task < tasks]
    summary = {"machine": machine, "settings": settings, "tasks": tasks, "rows": _summary(rows, chosen)}
    out.with_suffix(".summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    typer.echo(_table(summary["rows"]))


@app.command()
def solutions(
    out: Annotated[Path, typer.Argument(help="Where the histories are written.")],
    tasks: Annotated[int, typer.Option(help="How many.")] = 60,
    remarks: Annotated[int, typer.Option(help="Sentences in each record that nobody asks for.")] = 4,
) -> None:
    """Write what an agent without a mistake does in worlds of all levels, for `replay`; no model is asked."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", encoding="utf-8") as file:
        for task in range(tasks):
            world = make_world(HELD_OUT + task, 1 + task % LEVELS, remarks)
            replies = [
                _call(number, *one)
                for number, one in enumerate([*world.solution, (ANSWER, {"answer": world.answer})])
            ]
            chat, call = _played(replies), world.start().call
            made = run_agent(chat, call, world.messages, tool_schemas(), len(replies) + 1)
            file.write(json.dumps({"messages": made.messages}) + "\n")


def _played(replies: Iterable[dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """A chat that says these replies one after the other."""
    left = iter(replies)
    return lambda messages, tools, choice: next(left)


def _call(number: int, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    function = {"name": name, "arguments": json.dumps(arguments)}
    calls = [{"id": f"call_{number}", "type": "function", "function": function}]
    return {"role": "assistant", "content": "", "tool_calls": calls}


@app.command(name="replay")
def replay_command(
    traces: Annotated[Path, typer.Argument(help="Lines of JSON with messages, in OpenAI's shape.")],
    budget: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 1500,
    tokenizer: Annotated[str, typer.Option(help="Model whose tokens are counted.")] = "smollm2-135m",
    only: Annotated[str, typer.Option(help="Strategies, with commas.")] = ",".join(STRATEGIES),
) -> None:
    """Count recorded histories under each strategy, and print tokens and prices."""
    read = load_tokenizer(find_source(tokenizer))
    lines = map(json.loads, traces.read_text(encoding="utf-8").splitlines())
    # What a strategy has led to is another history than the one that is asked about.
    histories = [
        line["messages"] for line in lines if line.get("strategy", "none") == "none" and "messages" in line
    ]
    tokenize = partial(_encoded, read)
    typer.echo(f"{len(histories)} histories, {budget:,} tokens of budget\n")
    typer.echo(
        "| strategy | over budget | hit | missed | written | CNY, DSA | CNY, dense |\n|---|" + "---:|" * 6
    )
    for name in only.split(","):
        strategy = getattr(strategies, name)
        counted, over = [], 0
        for history in histories:
            try:
                counted.append(replay(history, strategy, budget, tokenize))
            except ContextBudgetError:
                over += 1
                # What it would have taken in a context without bounds.
                counted.append(replay(history, strategies.none, UNBOUNDED, tokenize))
        tokens = Tokens(*map(sum, zip(*counted, strict=True))) if counted else Tokens(0, 0, 0)
        prices = DEFAULT_PRICES.cost(tokens), DEFAULT_PRICES.dense_cost(tokens)
        shown = [str(over), *(f"{number:,}" for number in tokens), *(f"{price:.6f}" for price in prices)]
        typer.echo(f"| {name} | {' | '.join(shown)} |")


def _encoded(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    return tokenizer(encode(messages), add_special_tokens=False)["input_ids"]


def _rows(out: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Lines of an earlier run. Raises ResumeError if it had other settings."""
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
    rows = [json.loads(line) for line in lines]
    for row in rows:
        if row["settings"] != settings:
            raise ResumeError(f"{out} has lines with {row['settings']}, not {settings}; name another file")
    return rows


def _same_run(plain: Mapping[str, Any] | None, strategy: str) -> dict[str, Any] | None:
    """The run without a strategy, where no prompt was so long that this one would have done anything."""
    if plain is None or plain["longest"] + SLACK > strategies.TRIGGER * plain["settings"]["budget"]:
        return None
    return {**plain, "strategy": strategy, "is_same": True}


def _one_run(url: str, model: str, strategy: str, task: int, settings: dict[str, Any]) -> dict[str, Any]:
    """One task with one strategy: a line of the file."""
    kinds = settings["kinds"]
    kind, index = kinds[task % len(kinds)], HELD_OUT + task // len(kinds)
    possible = range(1, LEVELS + 1) if kind == "database" else READ_LEVELS
    level = possible[index % min(settings["levels"], len(possible))]
    endpoint, bill, started = ChatEndpoint(url, None, model, SilentReporter()), Bill(), time.perf_counter()
    endpoint.bill = bill
    chat = partial(_chat, endpoint, strategy, settings["budget"])
    with tempfile.TemporaryDirectory() as folder:
        messages, tools, run_tool, score = MAKERS[kind](index, level, settings["remarks"], Path(folder))
        # A beginning of its own: what another strategy left in the prefix cache is none of this one's hits.
        messages[0]["content"] = f"[{STRATEGIES.index(strategy)}] {messages[0]['content']}"
        answer, history, ended = None, messages, "answer"
        steps = 0
        try:
            made = run_agent(chat, run_tool, messages, tools, settings["steps"])
            answer, history, steps = made.answer, list(made.messages), made.steps
            ended = "answer" if answer is not None else "steps"
        except ContextFull:
            steps, ended = bill.requests, "context full"
        except EndpointError as error:
            steps, ended = bill.requests, f"refused: {error}"[:200]
        worth = score(answer or "")
    return {
        "settings": settings,
        "strategy": strategy,
        "task": task,
        "kind": kind,
        "level": level,
        "solved": worth.lenient == 1,
        "exact": worth.strict == 1,
        "ended": ended,
        "steps": steps,
        "longest": max(bill.prompts, default=0),
        "hit": bill.hit,
        "missed": bill.miss,
        "written": bill.output,
        "price": money_text(DEFAULT_PRICES.cost(Tokens(bill.hit, bill.miss, bill.output))),
        "dense_price": money_text(DEFAULT_PRICES.dense.cost(Tokens(bill.hit, bill.miss, bill.output))),
        "seconds": round(time.perf_counter() - started, 1),
        "answer": answer,
        "messages": history,
    }


def _chat(
    endpoint: ChatEndpoint,
    strategy: str,
    budget: int,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    choice: Any,
) -> dict[str, Any]:
    """The next message, with the strategy in the gateway; ContextFull without one, beyond the budget."""
    fields = {"tools": list(tools), "tool_choice": choice, "parallel_tool_calls": False}
    if strategy != "none":
        fields["fulmen_context"] = {"strategy": strategy, "budget": budget}
    reply = endpoint.complete(list(messages), REPLY_TOKENS, fields)
    if endpoint.bill.prompts[-1] > budget:
        raise ContextFull
    calls = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in reply.calls
    ]
    return {"role": "assistant", "content": reply.text, **({"tool_calls": calls} if calls else {})}


Made = tuple[list[dict[str, Any]], list[dict[str, Any]], Callable[..., str], Callable[[str], Score]]


def _database(index: int, level: int, remarks: int, folder: Path) -> Made:
    world = make_world(index, level, remarks)
    registry = world.start()
    return world.messages, tool_schemas(), registry.call, lambda answer: world.score(answer, registry)


def _documents(index: int, level: int, remarks: int, folder: Path) -> Made:
    task = RegisterDocuments(level, remarks)
    problem = task.problem(index)
    for path, text in task.documents(index):
        place = folder / "texts" / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text, encoding="utf-8")
    tools = DocumentTools(DocumentIndex(folder / "texts", folder / "index"), RESULT_LETTERS)

    def run_tool(name: str, arguments: Mapping[str, Any]) -> str:
        try:
            return tools.call(name, dict(arguments))
        except DocumentError as error:
            return f"error: {error}"

    schemas = [
        {
            "type": "function",
            "function": {"name": name, "description": TOOLS[name][0], "parameters": tool_schema(name)},
        }
        for name in ("list", "search", "open")
    ]
    question = problem.messages[-1]["content"].rpartition("Question: ")[2]
    messages = [{"role": "system", "content": READ_RULES}, {"role": "user", "content": question}]
    return messages, schemas, run_tool, partial(task.score, replace(problem))


MAKERS = {"database": _database, "documents": _documents}


def _summary(rows: Sequence[Mapping[str, Any]], chosen: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each strategy: shares and means, each with its interval."""
    found = []
    for name in chosen:
        own = [row for row in rows if row["strategy"] == name]
        if not own:
            continue
        means = {
            key: mean_interval([float(row[key]) for row in own])
            for key in ("steps", "hit", "missed", "written", "price", "dense_price")
        }
        solved = wilson_interval(sum(row["solved"] for row in own), len(own))
        exact = wilson_interval(sum(row["exact"] for row in own), len(own))
        unanswered = sum(row["ended"] != "answer" for row in own)
        found.append(
            {"strategy": name, "tasks": len(own), "unanswered": unanswered, "solved": solved, "exact": exact}
            | means
        )
    return found


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown; prices in thousandths of a yuan a task."""
    head = (
        "| strategy | tasks | solved, % | no answer | steps | hit | missed | written | price, DSA | dense |"
    )
    lines = [head, "|---|" + "---:|" * 9]
    for row in rows:
        shares = _within(row["solved"], 100, 0)
        counts = [
            _within(row[key], 1, 1 if key == "steps" else 0) for key in ("steps", "hit", "missed", "written")
        ]
        prices = [_within(row[key], 1000, 2) for key in ("price", "dense_price")]
        cells = [row["strategy"], str(row["tasks"]), shares, str(row["unanswered"]), *counts, *prices]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _within(interval: Interval, scale: float, digits: int) -> str:
    estimate, low, high = (f"{scale * value:,.{digits}f}" for value in interval)
    return f"{estimate} ({low} to {high})"


if __name__ == "__main__":
    app()

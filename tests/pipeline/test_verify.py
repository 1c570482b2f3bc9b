"""`fulmen verify`: data, scores, labels and refined proofs, of servers that are honest, lie, or go down."""

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from fulmen.cli.main import app
from fulmen.data import load_corpus
from fulmen.errors import ConfigError, CorpusError, EndpointError, OutputError, ResumeError
from fulmen.pipeline.reporter import SilentReporter
from fulmen.pipeline.verify import verify_label, verify_refine, verify_score, write_proofs
from fulmen.pipeline.verify_asking import ReplyJournal
from fulmen.pipeline.verify_label import VotedAnalysis, label_of, verdict_of
from fulmen.pipeline.verify_local import LocalWriter
from fulmen.pipeline.verify_rows import labelled_proofs, read_rows, write_rows
from fulmen.pipeline.verify_writers import Drawing
from fulmen.tasks.proofs.factory import proof_source, proof_task
from fulmen.tasks.proofs.replies import Assessment, strict_assessment
from tests.pipeline.proof_server import ProofServer, honest, parts_of, truth
from tests.tiny_source import save_tiny_source

PRAISE = "Analysis: A wonderful proof.\nStep: none\nScore: 1"


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_proofs_are_written_half_of_them_sound_and_none_twice(tmp_path):
    rows = write_proofs(tmp_path / "deep" / "proofs.jsonl", n=60)
    assert lines_of(tmp_path / "deep" / "proofs.jsonl") == rows
    assert sum(row["score"] == 1 for row in rows) == 30
    assert {row["kind"] for row in rows} == {"equations", "logic", "words"}
    assert all((row["step"] is None) == (row["fault"] is None) == (row["score"] == 1) for row in rows)
    others = write_proofs(tmp_path / "more.jsonl", n=60, seed=1)
    held_out = write_proofs(tmp_path / "held.jsonl", n=60, held_out=True)
    texts = [{row["problem"] for row in some} for some in (rows, others, held_out)]
    assert len(set().union(*texts)) == sum(map(len, texts))
    assert rows == write_proofs(tmp_path / "again.jsonl", n=60)


def test_files_of_the_user_are_not_replaced(tmp_path):
    proofs = tmp_path / "proofs.jsonl"
    first = write_proofs(proofs, n=4)
    with pytest.raises(OutputError, match="exists; name another file, or set overwrite"):
        write_proofs(proofs, n=6)
    for ask in (verify_label, verify_refine):
        with pytest.raises(OutputError, match="exists, and no run wrote it"):
            ask("http://127.0.0.1:9/v1", proofs, out=proofs)
    assert lines_of(proofs) == first
    assert list(tmp_path.iterdir()) == [proofs]
    assert len(write_proofs(proofs, n=6, overwrite=True)) == 6


def test_chat_rows_hold_the_reply_that_gets_the_whole_reward(tmp_path):
    path, task = tmp_path / "chat.jsonl", proof_task("verify_proof")
    for row in write_proofs(path, n=30, chat=True):
        asked, replied = row["messages"]
        problem = task.problem(row["index"])
        assert [asked] == list(map(dict, problem.messages))
        assert (asked["role"], replied["role"]) == ("user", "assistant")
        assert task.score(problem, replied["content"]).strict == 1
        assert strict_assessment(replied["content"]).step == row["step"]
    corpus = load_corpus(texts=[path.read_text()])
    assert corpus.training


def test_training_reads_chat_rows(tmp_path):
    write_proofs(tmp_path / "chat.jsonl", n=120, chat=True, kind="logic")
    documents = load_corpus(tmp_path / "chat.jsonl").training
    assert all("Score: " in one.text and one.text.startswith("user: Check the proof") for one in documents)


def test_an_honest_verifier_gets_all_and_praise_gets_half(tmp_path):
    with ProofServer(honest) as server:
        best = verify_score(server.url, n=60, out=tmp_path / "best").to_dict()
    with ProofServer(lambda asked, seed: PRAISE) as server:
        praise = verify_score(server.url, n=60).to_dict()
    for figures in (best["all"], best["by_kind"]["logic"], best["by_fault"]["reason"]):
        assert figures["accuracy"]["estimate"] == figures["score_exact"]["estimate"] == 1
        assert figures["cited_step_right"]["estimate"] == figures["reward"]["estimate"] == 1
    assert (best["all"]["n"], best["all"]["sound"]) == (60, 30)
    assert json.loads((tmp_path / "best" / "score.json").read_text()) == best
    assert praise["all"]["accuracy"]["estimate"] == 0.5
    assert praise["all"]["accuracy"]["low"] < 0.4
    assert praise["all"]["cited_step_right"] is None
    assert praise["all"]["reward"]["estimate"] <= 0.55
    assert praise["by_fault"]["sound"]["accuracy"]["estimate"] == 1


def test_what_is_out_of_form_counts_as_wrong_but_is_read(tmp_path):
    def careless(asked, seed):
        said = truth(*parts_of(asked))
        return f"I think the score is {said.score:g} because of step {said.step or 'none'}."

    with ProofServer(careless) as server:
        figures = verify_score(server.url, n=20, kind="words").to_dict()["all"]
    assert (
        figures["in_form"]["estimate"]
        == figures["accuracy"]["estimate"]
        == figures["reward"]["estimate"]
        == 0
    )
    assert figures["accuracy_lenient"]["estimate"] == 1


def test_a_server_that_goes_down_resumes(tmp_path):
    written = []

    def failing(asked, seed):
        written.append(asked)
        return None if len(written) > 7 else honest(asked, seed)

    with ProofServer(failing) as server:
        with pytest.raises(EndpointError, match=r"answered 500: out of memory; 7 replies are kept in .*same"):
            verify_score(server.url, n=20, concurrency=1, out=tmp_path)
        server.write = honest
        before = len(server.requests)
        report = verify_score(server.url, n=20, concurrency=3, out=tmp_path)
        assert len(server.requests) - before == 13
        assert report.to_dict()["all"]["reward"]["estimate"] == 1
        verify_score(server.url, n=20, out=tmp_path)
        assert len(server.requests) - before == 13


def test_so_many_requests_run_at_a_time():
    together = threading.Barrier(3, timeout=60)

    def waiting(asked, seed):
        together.wait()
        return honest(asked, seed)

    with ProofServer(waiting) as server:
        assert verify_score(server.url, n=6, concurrency=3).to_dict()["all"]["accuracy"]["estimate"] == 1


def test_a_reply_that_a_crash_cut_short_is_asked_for_again(tmp_path):
    journal = ReplyJournal(tmp_path / "replies.jsonl")
    journal.keep("a", "first\nline")
    with (tmp_path / "replies.jsonl").open("a") as file:
        file.write('{"key": "b", "rep')
    again = ReplyJournal(tmp_path / "replies.jsonl")
    assert (len(again), again.find("a"), again.find("b")) == (1, "first\nline", None)
    again.keep("b", "second")
    assert len(ReplyJournal(tmp_path / "replies.jsonl")) == 2
    (tmp_path / "replies.jsonl").write_text("no journal\n")
    with pytest.raises(ResumeError, match="holds no replies of fulmen"):
        ReplyJournal(tmp_path / "replies.jsonl")


def voted(score, upheld, votes=3):
    return VotedAnalysis(Assessment("because", 1 if score < 1 else None, score), upheld, votes)


@pytest.mark.parametrize(
    ("analyses", "label"),
    [
        ([voted(1, 0, 0)] * 3, 1.0),
        ([voted(0, 1), voted(0.5, 0), voted(1, 0, 0)], 1.0),
        ([voted(0, 2), voted(0, 3), voted(1, 0, 0)], 0.0),
        ([voted(0, 3), voted(0.5, 3), voted(0.5, 2)], 0.5),
        ([voted(0, 3), voted(0.5, 3)], None),
        ([voted(0, 1, 2), voted(0, 1, 2)], 1.0),
        ([], None),
    ],
)
def test_the_label_is_the_lowest_score_that_is_upheld(analyses, label):
    assert label_of(analyses, 2) == label


def test_verdicts_are_read():
    assert verdict_of("Reasons: it is there.\nVerdict: upheld") is True
    assert verdict_of("<think>Verdict: upheld</think>\n**Verdict:** Refuted.") is False
    assert verdict_of("Verdict: upheld\nVerdict: refuted") is None
    assert verdict_of("Verdict: upheld or refuted") is None
    assert verdict_of("") is None


def sceptic(asked, seed):
    """Analyses by a verifier that errs on every third; votes by one that looks."""
    if "Verdict: upheld or refuted" not in asked:
        return "Analysis: No.\nStep: 1\nScore: 0" if seed % 3 == 2 else honest(asked, seed)
    problem, rest = asked.split("\nProblem:\n")[1].split("\n\nProof:\n")
    proof, analysis = rest.split("\n\nAnalysis:")
    cited = re.search(r"^Step: (\d+)\nScore: (\S+)", analysis, re.MULTILINE)
    right = truth(problem, proof)
    upholds = cited[1] == str(right.step) and float(cited[2]) == right.score
    return f"Reasons: I looked.\nVerdict: {'upheld' if upholds else 'refuted'}"


def test_labels_without_people_are_the_truth(tmp_path):
    write_proofs(tmp_path / "proofs.jsonl", n=20, held_out=True)
    asked = {"out": tmp_path / "labels.jsonl", "analyses": 4, "votes": 3}
    asked = {"out": tmp_path / "labels.jsonl", "analyses": 4, "votes": 3}
    with ProofServer(sceptic) as server:
        rows = verify_label(server.url, tmp_path / "proofs.jsonl", concurrency=8, **asked)
        n_asked = len(server.requests)
        again = verify_label(server.url, tmp_path / "proofs.jsonl", **asked)
        assert len(server.requests) == n_asked
    assert again == rows == lines_of(tmp_path / "labels.jsonl")
    assert [row["label"] for row in rows] == [row["score"] for row in rows]
    sound = next(row for row in rows if row["score"] == 1)
    assert [one["upheld"] for one in sound["analyses"] if one["score"] == 0] == [0]


def first_wrong(asked, seed):
    """A prover whose first proofs leave out the last step; honest when it verifies."""
    if not asked.startswith("Solve the problem"):
        return honest(asked, seed)
    problem = asked.split("\nProblem:\n")[1].split("\n\nAnswer in this form")[0]
    steps = PROOFS[problem].splitlines()
    if "Earlier proof:" not in asked:
        steps = steps[:-1]
    else:
        assert "Step: " in asked.split("Readers:\n")[1]
    return "\n".join(["Proof:", *steps, PRAISE])


PROOFS: dict[str, str] = {}


@pytest.mark.parametrize("pool", [1, 2])
def test_proofs_get_better_by_what_readers_find(tmp_path, pool):
    made = [row for row in write_proofs(tmp_path / "all.jsonl", n=12, held_out=True) if row["score"] == 1]
    PROOFS.update({row["problem"]: row["proof"] for row in made})
    problems = [{key: row[key] for key in ("problem", "kind", "index")} for row in made]
    (tmp_path / "p.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in problems))
    with ProofServer(first_wrong) as server:
        rows = verify_refine(
            server.url, tmp_path / "p.jsonl", out=tmp_path / "r.jsonl", pool=pool, verifications=2, rounds=3
        )
        # Twice, before and after the refinement; what proofs that are alike are asked is asked once.
        assert len(server.requests) == len(rows) * (pool + 2) * 2
    for row, one in zip(rows, made, strict=True):
        assert row["history"] == [0, 1]
        assert (row["proof"], row["passes"], row["machine_score"]) == (one["proof"], True, 1)


def test_a_proof_that_never_passes_ends_with_the_rounds(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"problem": "Is every even number above 2 the sum of two primes?"}\n')

    def stubborn(asked, seed):
        if asked.startswith("Solve the problem"):
            return f"Proof:\n1. obvious: yes\n{PRAISE}"
        return "Analysis: Not obvious.\nStep: 1\nScore: 0"

    with ProofServer(stubborn) as server:
        (row,) = verify_refine(server.url, tmp_path / "p.jsonl", out=tmp_path / "r.jsonl", rounds=2)
        refined = [one for one in server.requests if "Earlier proof" in one["messages"][0]["content"]]
    assert row["history"] == [0, 0, 0]
    assert not row["passes"]
    assert "machine_score" not in row
    assert row["readers"][0]["analysis"] == "Not obvious."
    assert len(refined) == 2


def test_a_model_that_runs_here(tmp_path):
    source, replies = save_tiny_source(tmp_path / "tiny"), tmp_path / "score" / "replies.jsonl"

    def score():
        return verify_score(
            str(source), n=2, kind="words", max_new_tokens=3, device="cpu", out=tmp_path / "score"
        )

    assert score().to_dict()["all"]["in_form"]["estimate"] == 0
    assert score() == score()
    assert len(lines_of(replies)) == 2
    # Trained further, it is asked anew.
    weights = load_file(source / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    score()
    assert len(lines_of(replies)) == 4


def test_what_is_written_together_is_what_is_written_alone(tmp_path):
    source = save_tiny_source(tmp_path / "tiny", max_position_embeddings=4096)
    together = threading.Barrier(3, timeout=60)
    writer = LocalWriter(str(source), "cpu")
    asked = [({"role": "user", "content": "a b c" * length},) for length in (1, 30, 9)]
    alone = [writer.write(messages, Drawing(8, 0.0)) for messages in asked]

    def write(messages):
        together.wait()
        return writer.write(messages, Drawing(8, 0.0))

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(write, asked)) == alone
    assert len(set(alone)) > 1
    drawn = [writer.write(asked[0], Drawing(8, 1.0, number)) for number in (1, 2, 1)]
    assert drawn[0] == drawn[2] != drawn[1]


def run(*arguments):
    return CliRunner().invoke(app, ["verify", *map(str, arguments)])


def test_commands(tmp_path):
    proofs = tmp_path / "proofs.jsonl"
    made = run("make", "--kind", "words", "--n", 10, "--held-out", "--out", proofs)
    assert made.exit_code == 0
    assert "10 proofs: 5 sound, " in made.stderr
    with ProofServer(sceptic) as server:
        scored = run("score", server.url, "--data", proofs, "--out", tmp_path / "score")
        labelled = run("label", "--url", server.url, "--data", proofs, "--out", tmp_path / "labels.jsonl")
    assert (scored.exit_code, labelled.exit_code) == (0, 0)
    assert json.loads((tmp_path / "score" / "score.json").read_text())["all"]["n"] == 10
    assert re.search(r"words +│ 10 │ 100 \(72-100\) │ 100 ", scored.stderr)
    assert "of those with a score of their own 10 of 10 are labelled so" in labelled.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["score"], "give MODEL, or an address with --url"),
        (["score", "m", "--url", "http://127.0.0.1:1"], "one of the two"),
        (["score", "--url", "127.0.0.1:1"], "is no address"),
        (["score", "http://127.0.0.1:1", "--n", "0"], "n=0"),
        (["score", "http://127.0.0.1:1", "--n", "1000001"], "--n=1000001 cannot be; use 1,000,000 at most"),
        (["score", "http://127.0.0.1:1", "--kind", "poems"], "--kind='poems' is not known"),
        (["score", "http://127.0.0.1:1", "--concurrency", "0"], "concurrency=0"),
        (["make", "--out", "x.jsonl", "--seed", "100"], "--seed=100 cannot be; use 0 to 99"),
        (["make", "--out", ".", "--n", "1"], "--out=.* cannot be; name a file"),
        (["make", "--out", "x.jsonl", "--min-steps", "5", "--max-steps", "4"], "use 2 to 6, in order"),
        (["label", "http://127.0.0.1:1", "--data", "none.jsonl", "--out", "x"], "none.jsonl cannot be read"),
        (
            ["label", "http://127.0.0.1:1", "--data", "none.jsonl", "--out", "x", "--uphold", "9"],
            "--uphold=9 cannot be; use 1 to --analyses=8",
        ),
    ],
)
def test_mistakes_end_with_one_line(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2
    assert re.search(said, result.stderr.splitlines()[-1])
    assert not (tmp_path / "x.jsonl").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("{", r"rows.jsonl:1 is no JSON"),
        ("[" * 100_000, r"rows.jsonl:1 is no JSON"),
        ('{"problem": "P", "proof": "Q", "score": 1}\n[]\n', r"rows.jsonl:2 has no text 'problem'"),
        ('{"problem": "P", "proof": " "}', "has no text 'proof'"),
        ('{"problem": "P", "proof": "Q"}', "row 1 has score=None"),
        ('{"problem": "P", "proof": "Q", "score": 0, "step": "2"}', "step='2'"),
    ],
)
def test_rows_that_cannot_be(text, said, tmp_path):
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises((ConfigError, CorpusError), match=said):
        verify_score("http://127.0.0.1:1", data=tmp_path / "rows.jsonl")


@pytest.mark.parametrize("model", ["", None, 5], ids=repr)
def test_what_is_no_model_is_refused(model):
    with pytest.raises(ConfigError, match=r"model=.* cannot be; name an address, a model directory"):
        verify_score(model, n=1)


def test_rows_keep_any_text(tmp_path):
    proof = "line\u2028separator\x85and\x1cmore"
    write_rows(tmp_path / "rows.jsonl", [{"problem": "P", "proof": proof}] * 2)
    assert [row["proof"] for row in read_rows(tmp_path / "rows.jsonl", "problem", "proof")] == [proof] * 2
    (tmp_path / "rows.jsonl").write_bytes(b'\xef\xbb\xbf{"problem": "P", "proof": "Q"}\r\n')
    assert read_rows(tmp_path / "rows.jsonl", "problem", "proof") == [{"problem": "P", "proof": "Q"}]


class OneProof:
    """A source that always makes the same."""

    made = proof_source().labelled(0)

    def labelled(self, index):
        return self.made


def test_more_proofs_than_there_are():
    assert len(labelled_proofs(OneProof(), 1, False, 0, SilentReporter())) == 1
    with pytest.raises(ConfigError, match=r"n=2 cannot be: there are about 1 such proofs"):
        labelled_proofs(OneProof(), 2, False, 0, SilentReporter())

"""`fulmen keys` and `fulmen usage`, as a user and a spreadsheet see them."""

import csv
import io
import sys
from decimal import Decimal

import pytest
from typer.testing import CliRunner

from fulmen.cli.main import app
from fulmen.errors import AccountError
from fulmen.serving.billing.ledger import AttentionReads
from fulmen.serving.billing.prices import Tokens
from fulmen.serving.billing.store import open_billing, running

PLAIN = "a-key-of-the-environment-0123456789"


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    """The state folder, found by its variable."""
    folder = tmp_path / "deep" / "state"
    monkeypatch.setenv("FULMEN_STATE", str(folder))
    monkeypatch.setenv("COLUMNS", "150")
    for name in ("FULMEN_API_KEYS", "FULMEN_LEDGER"):
        monkeypatch.delenv(name, raising=False)
    return folder


def call(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def done(*arguments):
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments):
    result = call(*arguments)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def words_of(text):
    return [line.split() for line in text.splitlines()]


def test_add_prints_the_key_once_and_alone(state):
    result = call("keys", "add", "alice", "--balance", "10", "--concurrency", "4")
    (key,) = result.stdout.splitlines()
    assert key not in result.stderr
    books = open_billing(state)
    assert books.accounts.find(key).concurrency == 4
    assert books.ledger.balance("alice") == 10
    assert key not in done("keys", "list")


def test_list_shows_every_account_its_key_limit_and_balance(state, monkeypatch):
    done("keys", "add", "alice", "--balance", "2.50", "--concurrency", "4")
    done("keys", "add", "bob")
    done("keys", "revoke", "bob")
    monkeypatch.setenv("FULMEN_API_KEYS", f"carl:{PLAIN}")
    text = done("keys", "list")
    (_, alice, bob, carl) = words_of(text)
    assert alice[0] == "alice"
    assert alice[1] == "since"
    assert alice[3:] == ["4", "2.5", "CNY"]
    assert bob == ["bob", "revoked", "server's", "limit", "no", "limit"]
    assert carl == ["carl", "in", "FULMEN_API_KEYS", "server's", "limit", "no", "limit"]
    assert PLAIN not in text


def test_a_key_may_have_a_strategy_which_the_list_shows(state):
    done("keys", "add", "alice", "--strategy", "keep_newest")
    done("keys", "add", "bob")
    assert [words[-1] for words in words_of(done("keys", "list"))[1:]] == ["keep_newest", "are"]
    refused = call("keys", "add", "carl", "--strategy", "best")
    assert refused.exit_code == 2
    assert "summary, discard_75" in refused.stderr


def test_no_accounts_says_how_to_make_one():
    assert "fulmen keys add NAME" in done("keys", "list")


def test_topup_adds_and_a_new_key_keeps_the_balance(state):
    old = done("keys", "add", "alice", "--balance", "1").strip()
    assert "alice: 3.5 CNY" in call("keys", "topup", "alice", "2.5").stderr
    done("keys", "revoke", "alice")
    new = done("keys", "add", "alice").strip()
    books = open_billing(state)
    assert books.accounts.find(old) is None
    assert books.accounts.find(new).id == "alice"
    assert books.ledger.balance("alice") == Decimal("3.5")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("add", "taken"), "taken has a key"),
        (("add", "a b"), "account name 'a b'"),
        (("add", "new", "--balance", "much"), "amount 'much'"),
        (("add", "new", "--balance=-1"), "amount -1"),
        (("add", "new", "--balance", "NaN"), "amount NaN"),
        (("add", "new", "--concurrency", "0"), "concurrency=0"),
        (("topup", "nobody", "1"), "no account 'nobody'"),
        (("topup", "taken", "1e-12"), "amount 1E-12"),
        (("revoke", "nobody"), "no key to revoke"),
        (("list", "--ledger", "mysql://u:hunter2@host/x"), "'mysql'"),
    ],
)
def test_mistakes_are_one_line_and_change_nothing(state, arguments, said):
    done("keys", "add", "taken")
    before = (state / "keys.json").read_text()
    line = refused("keys", *arguments)
    assert said in line
    assert "hunter2" not in line
    assert (state / "keys.json").read_text() == before


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("fulmen.serving.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sqlalchemy", None)
    for arguments in (("keys", "list"), ("usage",)):
        assert "sqlalchemy is not installed; run: pip install 'fulmen[serve]'" in refused(*arguments)


def test_the_folders_price_table_counts_and_a_bad_one_is_named(state):
    state.mkdir(parents=True)
    table = state / "prices.toml"
    table.write_text('currency = "USD"\n[rates]\nhit = 0.028\nmiss = 0.28\noutput = 0.42\n')
    done("keys", "add", "alice", "--balance", "1")
    assert "1 USD" in done("keys", "list")
    table.write_text('currency = "USD"\n[rates]\nhit = 0.028\nmiss = 0.28\n')
    assert "rates.output is missing" in refused("usage")


def use(state):
    """Two settled requests and an open one; their charges."""
    ledger = open_billing(state).ledger
    charges = []
    for name, account in [("r1", "alice"), ("r2", "bob"), ("r3", "alice")]:
        ledger.begin(name, account, "tiny", "/v1/chat/completions")
    charges.append(ledger.settle("r1", Tokens(1000, 200, 30), "stop", AttentionReads(4000, 1000, 2 * 10**9)))
    charges.append(ledger.settle("r2", Tokens(0, 1, 0), "length"))
    return charges


def test_usage_as_csv_has_every_request_in_plain_digits(state):
    charges = use(state)
    rows = list(csv.DictReader(io.StringIO(done("usage", "--csv"))))
    assert [row["request_id"] for row in rows] == ["r1", "r2", "r3"]
    assert [row["state"] for row in rows] == ["settled", "settled", "open"]
    assert [Decimal(row["charge"]) for row in rows[:2]] == charges
    assert rows[1]["charge"] == "0.000002"
    assert (rows[2]["charge"], rows[2]["settled"], rows[1]["tokens_read"]) == ("", "", "")
    assert (rows[0]["context_tokens"], rows[0]["tokens_read"]) == ("4000", "1000")
    for row in rows[:2]:  # a customer can count it again
        parts = [("hit", "prompt_hit"), ("miss", "prompt_miss"), ("output", "output")]
        again = sum(Decimal(row[f"rate_{kind}"]) * int(row[count]) for kind, count in parts) / 10**6
        assert again == Decimal(row["charge"])
        assert row["begun"].endswith("+00:00")


def test_usage_is_cut_by_account_and_time(state):
    use(state)
    assert [row[1] for row in csv.reader(done("usage", "--csv", "--key", "bob").splitlines())] == [
        "account",
        "bob",
    ]
    assert len(done("usage", "--csv", "--since", "2999-01-01").splitlines()) == 1
    assert len(done("usage", "--csv", "--until", "2999-01-01T00:00:00").splitlines()) == 4
    assert "no requests" in done("usage", "--until", "2001-01-01")


def test_usage_shows_totals_by_account(state):
    use(state)
    _, alice, bob = words_of(done("usage"))
    assert alice == ["alice", "2", "1,000", "200", "30", "0.00069", "25.0", "%", "2.0"]
    assert bob == ["bob", "1", "0", "1", "0", "0.000002", "0.0"]


def test_one_server_at_a_time_holds_the_folder(state):
    with running(state):
        with pytest.raises(AccountError, match="another server runs"), running(state):
            pass
        done("keys", "add", "alice")  # which a running server does not hinder
    with running(state):
        pass

"""The ledger against books kept by hand: one charge per request, under threads, processes and kills.

On SQLite always; on PostgreSQL too if FULMEN_TEST_POSTGRES is the URL of a database, in schemas of their own.
"""

import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from uuid import uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import create_engine, make_url, text

from fulmen.errors import ConfigError, InsufficientBalance, LedgerError
from fulmen.serving.billing.ledger import AttentionReads, Ledger
from fulmen.serving.billing.prices import DEFAULT_PRICES, PriceTable, Rates, Tokens
from tests.serving.billing import ledger_worker

POSTGRES = os.environ.get("FULMEN_TEST_POSTGRES")
DEAR = PriceTable("CNY", Rates(Decimal(100), Decimal(200), Decimal(300)), None)
CHAT = ("tiny", "/v1/chat/completions")
NEEDS_POSTGRES = pytest.mark.skipif(not POSTGRES, reason="FULMEN_TEST_POSTGRES has no URL")


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=NEEDS_POSTGRES)])
def place(request, tmp_path):
    """Where a new ledger may be."""
    if request.param == "sqlite":
        yield tmp_path / "ledger.db"
        return
    url, schema = make_url(POSTGRES).set(drivername="postgresql+psycopg"), f"test_{uuid4().hex}"
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE SCHEMA {schema}"))
        inside = url.update_query_dict({"options": f"-csearch_path={schema}"})
        yield inside.render_as_string(hide_password=False)
        connection.execute(text(f"DROP SCHEMA {schema} CASCADE"))


@pytest.fixture
def ledger(place):
    ledger = Ledger(place, DEFAULT_PRICES, "here")
    yield ledger
    ledger.close()


def sql(place, query):
    """What the database itself says, past the ledger's code."""
    engine = create_engine(place if isinstance(place, str) else f"sqlite:///{place}")
    with engine.connect() as connection:
        rows = connection.execute(text(query)).all()
    engine.dispose()
    return [tuple(row) for row in rows]


def require_reconciled(place):
    """Every request has one charge, and every balance is deposits minus charges, counted in Python."""
    assert not sql(place, "SELECT id FROM requests WHERE state <> 'settled' OR charge IS NULL")
    owed = Counter(dict(sql(place, "SELECT id, 0 FROM accounts")))
    for account, amount in sql(place, "SELECT account, amount FROM deposits"):
        owed[account] += amount
    for account, charge in sql(place, "SELECT account, charge FROM requests"):
        owed[account] -= charge
    assert dict(owed) == dict(sql(place, "SELECT id, balance FROM accounts"))


def test_a_request_is_charged_by_the_rates_and_the_balance_falls_by_it(ledger, place):
    ledger.deposit("alice", Decimal(1), "first")
    ledger.begin("r", "alice", *CHAT)
    ledger.progress("r", Tokens(5, 10, 1))
    charge = ledger.settle("r", Tokens(1000, 500, 20), "stop", AttentionReads(30_000, 9_000, 123))
    assert charge == (1000 * Decimal("0.2") + 500 * 2 + 20 * 3) / 10**6
    assert ledger.balance("alice") == 1 - charge
    (row,) = ledger.rows()
    assert (row.account, row.model, row.endpoint, row.state, row.outcome) == (
        "alice",
        *CHAT,
        "settled",
        "stop",
    )
    assert (row.prompt_hit, row.prompt_miss, row.output, row.charge) == (1000, 500, 20, charge)
    assert (row.context_tokens, row.tokens_read, row.bytes_saved) == (30_000, 9_000, 123)
    assert (row.rate_hit, row.rate_miss, row.rate_output) == DEFAULT_PRICES.rates
    assert row.begun <= row.settled
    assert abs(row.settled - datetime.now(UTC)) < timedelta(minutes=1)
    require_reconciled(place)


def test_a_second_settle_changes_nothing_and_returns_the_first_charge(ledger, place):
    ledger.begin("r", "alice", *CHAT)
    charge = ledger.settle("r", Tokens(0, 100, 1), "stop")
    before = list(ledger.rows())
    assert ledger.settle("r", Tokens(9, 900, 9), "error", AttentionReads(1, 1, 1)) == charge
    ledger.progress("r", Tokens(9, 900, 9))
    assert ledger.recover() == 0
    assert list(ledger.rows()) == before
    require_reconciled(place)


def test_recover_charges_the_last_usage_of_its_own_server_alone(ledger, place):
    other = Ledger(place, DEFAULT_PRICES, "elsewhere")
    for book, request_id in [(ledger, "mine"), (ledger, "mute"), (other, "theirs")]:
        book.begin(request_id, "alice", *CHAT)
    ledger.progress("mine", Tokens(10, 20, 1))
    ledger.progress("mine", Tokens(10, 20, 30))
    assert ledger.recover() == 2
    rows = {row.request_id: row for row in ledger.rows()}
    assert rows["mine"].charge == DEFAULT_PRICES.cost(Tokens(10, 20, 30))
    assert (rows["mine"].outcome, rows["mine"].tokens_read) == ("crashed", None)
    assert rows["mute"].charge == 0
    assert (rows["theirs"].state, rows["theirs"].charge, rows["theirs"].settled) == ("open", None, None)
    other.settle("theirs", Tokens(1, 2, 3), "stop")
    other.close()
    require_reconciled(place)


def test_a_request_costs_what_was_announced_when_it_began(ledger, place):
    ledger.begin("old", "alice", *CHAT)
    dear = Ledger(place, DEAR, "here")
    dear.begin("new", "alice", *CHAT)
    tokens = Tokens(7, 11, 13)
    assert dear.settle("old", tokens, "stop") == DEFAULT_PRICES.cost(tokens)
    assert ledger.settle("new", tokens, "stop") == DEAR.cost(tokens)
    dear.close()


def test_used_up_is_refused_and_leaves_no_row_until_it_is_topped_up(ledger, place):
    ledger.deposit("alice", Decimal("0.0001"), "little")
    ledger.begin("r", "alice", *CHAT)
    ledger.settle("r", Tokens(0, 100, 0), "stop")  # 0.0002: below zero
    with pytest.raises(InsufficientBalance, match=r"alice is -0\.0001 CNY"):
        ledger.begin("s", "alice", *CHAT)
    ledger.deposit("alice", Decimal("0.0001"), "exactly")
    with pytest.raises(InsufficientBalance, match="alice is 0 CNY"):
        ledger.begin("s", "alice", *CHAT)
    ledger.deposit("alice", Decimal("0.000000001"), "one unit")
    ledger.begin("s", "alice", *CHAT)
    assert [row.request_id for row in ledger.rows()] == ["r", "s"]


def test_no_deposit_is_no_limit_and_the_first_counts_what_was_used_before(ledger):
    ledger.begin("r", "alice", *CHAT)
    charge = ledger.settle("r", Tokens(0, 100, 0), "stop")
    assert ledger.balance("alice") is None
    assert ledger.balance("nobody") is None
    ledger.deposit("alice", Decimal(0), "a limit from now on")
    assert ledger.balance("alice") == -charge


def test_what_cannot_be_is_refused(ledger):
    with pytest.raises(LedgerError, match="gone is not in the ledger"):
        ledger.settle("gone", Tokens(0, 0, 0), "stop")
    ledger.begin("r", "alice", *CHAT)
    with pytest.raises(LedgerError, match="r is in the ledger already"):
        ledger.begin("r", "bob", *CHAT)
    assert [row.account for row in ledger.rows()] == ["alice"]
    for amount in ("-1", "1e-10", "1e30", "NaN"):
        with pytest.raises(ConfigError, match="amount"):
            ledger.deposit("alice", Decimal(amount), "")
    assert ledger.balance("alice") is None


def test_a_ledger_keeps_its_currency_and_its_version(place, ledger):
    with pytest.raises(LedgerError, match="in CNY, the price table in USD"):
        Ledger(place, PriceTable("USD", DEAR.rates, None))
    engine = create_engine(place if isinstance(place, str) else f"sqlite:///{place}")
    with engine.begin() as connection:
        connection.execute(text("UPDATE book SET version = 99"))
    engine.dispose()
    with pytest.raises(LedgerError, match="version 99"):
        Ledger(place, DEFAULT_PRICES)


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("mysql://root:hunter2@host/x", "'mysql'"),
        ("hunter2", "URL cannot be read"),
        ("postgresql://u:hunter2@127.0.0.1:1/x", "database failed|psycopg"),
        (Path("/nowhere/ledger.db"), "database failed"),
        (Path(__file__), "database failed"),
    ],
)
def test_a_place_that_cannot_be_is_one_line_without_the_password(place, said):
    with pytest.raises(LedgerError, match=said) as refused:
        Ledger(place, DEFAULT_PRICES)
    assert "hunter2" not in str(refused.value)
    assert "\n" not in str(refused.value)


def spoil(file, kind):
    """Make something else of a ledger's file."""
    whole = file.read_bytes()
    noise = random.Random(0).randbytes(len(whole))
    if kind == "another program's":
        file.unlink()
        with sqlite3.connect(file) as other:
            other.execute("CREATE TABLE book (title)")
        other.close()
    else:
        spoilt = {
            "noise": noise,
            "text": b"not a ledger",
            "cut": whole[:5000],
            "middle": whole[:4096] + noise,
        }
        file.write_bytes(spoilt[kind])


@pytest.mark.parametrize("kind", ["noise", "text", "cut", "middle", "another program's"])
def test_a_damaged_ledger_is_named_by_its_file_with_the_remedy(tmp_path, kind):
    file = tmp_path / "ledger.db"
    Ledger(file, DEFAULT_PRICES).close()
    spoil(file, kind)
    file.chmod(0o644)
    with pytest.raises(LedgerError, match="move it away") as refused:
        Ledger(file, DEFAULT_PRICES)
    assert str(file) in str(refused.value)
    assert "\n" not in str(refused.value)
    assert file.stat().st_mode & 0o777 == 0o644, "what is not ours is left as it is"


@pytest.mark.parametrize("old", [False, True], ids=["new", "of an earlier version"])
def test_a_ledger_is_its_owners_alone_whatever_the_umask(tmp_path, old):
    file = tmp_path / "ledger.db"
    before = os.umask(0)
    try:
        if old:
            sqlite3.connect(file).execute("VACUUM")
            assert file.stat().st_mode & 0o777 == 0o644
        ledger = Ledger(file, DEFAULT_PRICES)
        ledger.deposit("alice", Decimal(1), "test")
    finally:
        os.umask(before)
    modes = {part.name: part.stat().st_mode & 0o777 for part in tmp_path.iterdir()}
    assert modes == {"ledger.db": 0o600, "ledger.db-wal": 0o600, "ledger.db-shm": 0o600}
    ledger.close()


def test_rows_are_cut_by_account_and_by_time_and_may_be_read_while_requests_begin(ledger):
    for place in range(6):
        ledger.begin(f"r{place}", f"account{place % 2}", *CHAT)
        ledger.settle(f"r{place}", Tokens(0, 0, place), "stop")
    assert [row.output for row in ledger.rows("account1")] == [1, 3, 5]
    reading = ledger.rows()
    first = next(reading)
    ledger.begin("during", "account0", *CHAT)
    assert [first.request_id, *(row.request_id for row in reading)] == [f"r{place}" for place in range(6)]
    moment = max(row.begun for row in ledger.rows())
    before, after = list(ledger.rows(until=moment)), list(ledger.rows(since=moment))
    assert len(before) + len(after) == 7
    assert "during" in {row.request_id for row in after}


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["begin", "progress", "settle", "deposit", "recover"]),
        st.integers(0, 3),
        st.tuples(*[st.integers(0, 10**6)] * 3),
    ),
    max_size=25,
)


@settings(max_examples=40, deadline=None)
@given(STEPS)
def test_any_order_of_calls_keeps_the_book_of_a_dictionary(steps):
    ledger = Ledger("sqlite://", DEFAULT_PRICES)  # in memory
    usage, charges, paid, prepaid = {}, {}, Decimal(0), False
    for action, number, counts in steps:
        request_id, tokens = f"r{number}", Tokens(*counts)
        if action == "deposit":
            paid, prepaid = paid + number, True
            ledger.deposit("alice", Decimal(number), "")
        elif action == "recover":
            assert ledger.recover() == len(usage.keys() - charges.keys())
            charges = {name: DEFAULT_PRICES.cost(last) for name, last in usage.items()} | charges
        elif action == "begin" and prepaid and paid - sum(charges.values()) <= 0:
            with pytest.raises(InsufficientBalance):
                ledger.begin(request_id, "alice", *CHAT)
        elif action == "begin" and request_id not in usage:
            ledger.begin(request_id, "alice", *CHAT)
            usage[request_id] = Tokens(0, 0, 0)
        elif action == "progress" and request_id in usage:
            ledger.progress(request_id, tokens)
            usage[request_id] = tokens
        elif action == "settle" and request_id in usage:
            charge = ledger.settle(request_id, tokens, "stop")
            assert charge == charges.setdefault(request_id, DEFAULT_PRICES.cost(tokens))
    assert {row.request_id: row.charge for row in ledger.rows() if row.charge is not None} == charges
    assert ledger.balance("alice") == (paid - sum(charges.values()) if prepaid else None)
    ledger.close()


def test_threads_that_settle_the_same_requests_charge_each_once(ledger, place):
    names = [f"r{number}" for number in range(20)]
    # Threads of one ledger take turns; another ledger's wait for the database alone.
    books = [ledger, Ledger(place, DEFAULT_PRICES), Ledger(place, DEFAULT_PRICES)]
    ledger.deposit("alice", Decimal(1), "")
    for name in names:
        ledger.begin(name, "alice", *CHAT)
    returned = [{} for _ in range(6)]

    def settle_all(mine, thread):
        for name in random.Random(thread).sample(names, len(names)):
            mine[name] = books[thread % 3].settle(name, Tokens(0, thread, 0), "stop")

    threads = [threading.Thread(target=settle_all, args=(mine, n)) for n, mine in enumerate(returned, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(mine == {row.request_id: row.charge for row in ledger.rows()} for mine in returned)
    for book in books[1:]:
        book.close()
    require_reconciled(place)


def start_worker(place, server, threads, count):
    command = [sys.executable, ledger_worker.__file__, place, server, threads, count]
    return subprocess.Popen(list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_processes_that_open_and_write_one_ledger_lose_nothing(place):
    workers = [start_worker(place, f"server{n}", 2, 10) for n in range(3)]
    heard = [worker.communicate("go\n", timeout=120)[0].splitlines() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0, 0]
    charged = [line.split()[1:] for lines in heard for line in lines if line.startswith("charged")]
    assert len(charged) == 60
    assert {name: int(units) for name, units in charged} == dict(
        sql(place, "SELECT id, charge FROM requests")
    )
    require_reconciled(place)


def heard_by_clients(lines):
    """(units charged by request, last tokens sent by request) of a worker's whole lines."""
    words = [line.split() for line in lines if line.endswith("\n")]
    charged = {name: int(units[0]) for kind, name, *units in words if kind == "charged"}
    sent = {name: Tokens(0, *map(int, counts)) for kind, name, *counts in words if kind == "answered"}
    return charged, sent


@pytest.mark.parametrize("seed", range(2))
def test_a_killed_server_loses_no_charge_and_makes_none_twice(place, seed):
    chance = random.Random(seed)
    for life in range(3):
        worker = start_worker(place, f"life{life}", 4, 10_000)
        assert worker.stdout.readline() == "ready\n"
        worker.stdin.write("go\n")
        worker.stdin.flush()
        lines = [worker.stdout.readline() for _ in range(chance.randrange(1, 60))]
        time.sleep(chance.random() * 0.02)  # so that it falls anywhere within a transaction, not after a line
        worker.send_signal(signal.SIGKILL)
        lines += worker.communicate(timeout=60)[0].splitlines(keepends=True)
        charged, sent = heard_by_clients(lines)
        after = Ledger(place, DEAR, f"life{life}")
        open_before = {row.request_id for row in after.rows() if row.state == "open"}
        assert after.recover() == len(open_before) <= 4
        assert after.recover() == 0
        rows = {row.request_id: row for row in after.rows()}
        require_reconciled(place)
        for name, units in charged.items():
            assert rows[name].charge * 10**9 == units
            assert after.settle(name, Tokens(9, 9, 9), "again") == rows[name].charge
        assert all(rows[name].charge >= DEFAULT_PRICES.cost(tokens) for name, tokens in sent.items())
        require_reconciled(place)
        after.close()

"""API keys: who is found by one, what is kept of it, and what never shows it."""

import json
import logging
import subprocess
import sys
from itertools import combinations

import pytest

from fulmen.errors import AccountError, ConfigError
from fulmen.serving.billing.accounts import Accounts, parse_environment
from fulmen.serving.billing.key_file import KEYS, SECRET

PLAIN = "a-key-of-the-environment-0123456789"
ISSUE = """
import sys
from pathlib import Path
from fulmen.serving.billing.accounts import Accounts
accounts = Accounts(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for place in range(20):
    accounts.issue(f"{sys.argv[2]}-{place}")
"""


@pytest.fixture
def accounts(tmp_path):
    return Accounts(tmp_path / "state", f"carl:{PLAIN}")


def everything_kept(accounts, folder):
    texts = [file.read_bytes().decode() for file in folder.rglob("*") if file.is_file()]
    return "\n".join([*texts, repr(vars(accounts)), repr(accounts), repr(list(accounts))])


def test_a_key_finds_its_account_and_no_other(accounts):
    keys = {name: accounts.issue(name, limit) for name, limit in [("alice", 4), ("bob", None)]}
    found = {name: accounts.find(key) for name, key in {**keys, "carl": PLAIN}.items()}
    assert [(account.id, account.name, account.concurrency) for account in found.values()] == [
        ("alice", "alice", 4),
        ("bob", "bob", None),
        ("carl", "carl", None),
    ]
    assert len(accounts) == 3
    for wrong in ("", "sk-", keys["bob"][:-1], keys["bob"] + " ", keys["bob"].swapcase(), "é\ud800", "\0"):
        assert accounts.find(wrong) is None


def test_keys_are_long_random_and_never_kept(accounts, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    keys = [accounts.issue(f"name{place}") for place in range(5)]
    assert all(key.startswith("sk-") and len(key) >= 3 + 43 for key in keys)
    assert len(set(keys)) == 5
    account = accounts.find(keys[0])
    kept = everything_kept(accounts, tmp_path) + caplog.text + repr(account)
    assert not any(key in kept or key.removeprefix("sk-") in kept for key in [*keys, PLAIN])
    assert account.salt not in repr(account) + str(account)


def test_a_strategy_stays_with_the_account_and_its_key(tmp_path):
    accounts = Accounts(tmp_path)
    key = accounts.issue("alice", strategy="discard_all")
    assert accounts.find(key).strategy == "discard_all"
    assert Accounts(tmp_path).get("alice").strategy == "discard_all"
    assert accounts.find(accounts.issue("bob")).strategy is None
    with pytest.raises(ConfigError, match=r"strategy='none' is none; use one of summary, discard_75"):
        accounts.issue("carl", strategy="none")
    file = tmp_path / "keys.json"
    file.write_text(file.read_text().replace("discard_all", "best"))
    with pytest.raises(AccountError, match="strategy='best' of alice"):
        Accounts(tmp_path)


def test_files_are_their_owners_alone(accounts, tmp_path):
    accounts.issue("alice")
    state = tmp_path / "state"
    assert state.stat().st_mode & 0o777 == 0o700
    assert all((state / name).stat().st_mode & 0o777 == 0o600 for name in (KEYS, SECRET))
    assert not list(state.glob("*.part"))


def test_a_revoked_key_finds_nobody_and_the_account_gets_a_new_one(accounts):
    old, other = accounts.issue("alice", 2), accounts.issue("bob")
    accounts.revoke("alice")
    assert len(accounts) == 3  # or a server would do without keys when the last is revoked
    assert accounts.find(old) is None
    assert accounts.find(other).id == "bob"
    assert accounts.get("alice").concurrency == 2
    new = accounts.issue("alice", 3)
    assert accounts.find(old) is None
    assert accounts.find(new) == accounts.get("alice")
    assert accounts.get("alice").concurrency == 3


def test_a_server_sees_what_another_process_does(accounts, tmp_path):
    desk = Accounts(tmp_path / "state")
    key = desk.issue("alice")
    assert accounts.find(key).id == "alice"
    desk.revoke("alice")
    assert accounts.find(key) is None


def test_two_processes_issue_keys_and_lose_none(tmp_path):
    running = [
        subprocess.Popen(
            [sys.executable, "-c", ISSUE, tmp_path, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "two")
    ]
    for process in running:
        assert process.stdout.readline() == "ready\n"
    for process in running:
        process.communicate("go\n", timeout=60)
    assert len(Accounts(tmp_path)) == 40


def test_salts_differ_by_account_and_server_and_last(tmp_path):
    salts = []
    for server in ("one", "two"):
        for name in ("alice", "bob"):
            accounts = Accounts(tmp_path / server)
            accounts.issue(name)
            salts.append(accounts.get(name).salt)
            assert Accounts(tmp_path / server).get(name).salt == salts[-1]
    assert all(one != other for one, other in combinations(salts, 2))
    assert Accounts(tmp_path / "one").server != Accounts(tmp_path / "two").server


@pytest.mark.parametrize("name", ["", "a b", "../x", "ä", "x" * 65, "sk-something", "a:b", "-a", "a\n"])
def test_names_that_cannot_be(accounts, name):
    with pytest.raises(AccountError, match="account name"):
        accounts.issue(name)


def test_what_is_taken_missing_or_elsewhere_is_refused(accounts):
    accounts.issue("alice")
    for action, name, said in [
        (accounts.issue, "alice", "has a key"),
        (accounts.issue, "carl", "FULMEN_API_KEYS"),
        (accounts.revoke, "carl", "FULMEN_API_KEYS"),
        (accounts.revoke, "dora", "no key to revoke"),
        (accounts.get, "dora", "no account"),
    ]:
        with pytest.raises(AccountError, match=said):
            action(name)
    with pytest.raises(ConfigError, match="concurrency=0"):
        accounts.issue("dora", 0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (PLAIN, "entry 1 has no colon"),
        (f"ann:{PLAIN},{PLAIN}x", "entry 2 has no colon"),
        (f"{PLAIN * 2}:ann", "name of entry 1"),
        (f"sk-{PLAIN}:ann", "name of entry 1"),
        (f":{PLAIN}", "name of entry 1"),
        ("ann:short", "key of ann"),
        (f"ann:{PLAIN}é", "key of ann"),
        (f"ann:{PLAIN} {PLAIN}", "key of ann"),
        (f"ann:{PLAIN},ann:{PLAIN}x", "ann is there twice"),
        (f"ann:{PLAIN},bob:{PLAIN}", "another account's"),
    ],
)
def test_a_bad_entry_is_named_and_no_key_shown(text, said):
    with pytest.raises(AccountError, match=said) as refused:
        parse_environment(text)
    assert PLAIN not in str(refused.value)


def test_the_environment_may_have_spaces_and_a_last_comma():
    assert list(parse_environment(f" ann:{PLAIN}, bob:{PLAIN}x, ")) == ["ann", "bob"]
    assert parse_environment("") == {}


def test_a_name_on_both_sides_is_refused(tmp_path):
    Accounts(tmp_path).issue("alice")
    with pytest.raises(AccountError, match=r"alice is in FULMEN_API_KEYS and in .*keys\.json"):
        Accounts(tmp_path, f"alice:{PLAIN}")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"key": PLAIN}, "key of ann is unknown"),
        ({"key_sha256": PLAIN, "concurrency": None, "issued": ""}, "no SHA-256"),
        ({"key_sha256": None, "concurrency": 0, "issued": ""}, "concurrency=0"),
        ({"key_sha256": None, "concurrency": True, "issued": ""}, "concurrency=True"),
        ({"key_sha256": None}, "no key file"),
        (PLAIN, "no key file"),
    ],
)
def test_a_file_with_a_plain_key_or_nonsense_is_refused_unseen(tmp_path, fields, said):
    (tmp_path / KEYS).write_text(json.dumps({"accounts": {"ann": fields}}))
    with pytest.raises(AccountError, match=said) as refused:
        Accounts(tmp_path)
    assert PLAIN not in str(refused.value)


def test_a_key_file_that_goes_away_lets_nobody_in(accounts, tmp_path):
    key = accounts.issue("alice")
    assert accounts.find(key).id == "alice"
    (tmp_path / "state" / KEYS).unlink()
    for ask in (lambda: accounts.find(key), lambda: len(accounts)):
        with pytest.raises(AccountError, match=r"keys\.json is gone"):
            ask()


@pytest.mark.parametrize("text", ["", "[]", "{", '{"accounts": 3}', "null"])
def test_a_damaged_key_file_stops_a_running_server_from_letting_anybody_in(accounts, tmp_path, text):
    (tmp_path / "state" / KEYS).write_text(text)
    with pytest.raises(AccountError, match="no key file"):
        accounts.find(PLAIN)


def test_a_secret_that_others_read_or_that_is_cut_is_refused(tmp_path):
    Accounts(tmp_path)
    secret = tmp_path / SECRET
    secret.chmod(0o640)
    with pytest.raises(AccountError, match="chmod 600"):
        Accounts(tmp_path)
    secret.chmod(0o600)
    secret.write_text(secret.read_text()[:10])
    with pytest.raises(AccountError, match="damaged"):
        Accounts(tmp_path)

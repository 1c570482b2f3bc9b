"""What engines print is kept from one to the next, and bounded."""

import stat

import pytest

from fulmen.errors import OutputError
from fulmen.serving.engine import log as log_module
from fulmen.serving.engine.log import EngineLog


def test_the_last_engines_words_are_kept_and_not_taken_for_the_next_ones(tmp_path):
    log = EngineLog(tmp_path / "new" / "engine.log")
    with log.begin() as file:
        file.write(b"ValueError: one\nbye\n")
    assert log.last_words() == "ValueError: one"
    with log.begin():
        assert log.last_words() == "it said nothing"
    lines = log.path.read_text().splitlines()
    assert [line.partition(",")[0] for line in lines] == [
        "--- an engine is started",
        "ValueError: one",
        "bye",
        "--- an engine is started",
    ]
    assert stat.S_IMODE(log.path.stat().st_mode) == 0o600


def test_the_first_process_that_failed_says_why(tmp_path):
    log = EngineLog(tmp_path / "engine.log")
    place = "(Worker pid=7) ERROR 12-01 04:55:06 [executor.py:953]"
    lines = [
        "(APIServer pid=1) WARNING 12-01 04:54:42 [utils.py:255] errors like `OSError: [Errno 24] Too many`",
        f'{place}   File "models.py", line 227, in require_settings',
        f"{place} fulmen.errors.ConfigError: dtype=torch.float16 is not supported",
        *(f"{place} {number}" for number in range(300)),
        "(EngineCore pid=6) Exception: WorkerProc initialization failed due to an exception in a process.",
        "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}",
        "bye",
    ]
    with log.begin() as file:
        file.write("\n".join(lines).encode())
    assert log.last_words() == "ConfigError: dtype=torch.float16 is not supported"
    with log.begin() as file:
        file.write(lines[-2].encode())
    assert log.last_words() == lines[-2]


def test_an_error_without_a_message_is_one(tmp_path):
    log = EngineLog(tmp_path / "engine.log")
    with log.begin() as file:
        file.write(b"(Worker pid=7) ERROR [executor.py:953] AssertionError\nbye\n")
    assert log.last_words() == "AssertionError"


def test_too_much_is_set_aside_while_the_engine_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(log_module, "MOST_BYTES", 1000)
    log = EngineLog(tmp_path / "engine.log")
    with log.begin() as file:
        for number in range(3):
            file.write(1200 * str(number).encode() + b"\n")
            file.flush()
            log.bound()
        file.write(b"the end\n")
    assert log.path.read_text() == "the end\n"
    assert (tmp_path / "engine.log.1").read_text() == 1200 * "2" + "\n"
    assert log.last_words() == "the end"


def test_a_log_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "engine.log").mkdir()
    with pytest.raises(OutputError, match=r"engine\.log cannot be written"):
        EngineLog(tmp_path / "engine.log").begin()

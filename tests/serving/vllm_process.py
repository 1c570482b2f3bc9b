"""Programs that begin with vLLM imported, which takes ten seconds: forks of a process that has done it."""

from tests.fork_server import Forked, ForkServer

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    # As `fulmen serve` has it: else a function of the sampler's is compiled, by a C++ compiler.
    "TORCHDYNAMO_DISABLE": "1",
}
VLLM = ForkServer(("vllm.entrypoints.llm", "vllm.v1.worker.cpu_worker"), SETTINGS)
INSPECT_HERE = "from tests.serving.vllm_process import inspect_here; inspect_here()\n"


def inspect_here():
    """Let vLLM look at each class of models in this process, where it would start another that imports vLLM.

    It does so once for a class, and keeps in the user's cache what it found.
    """
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda inspect: inspect()


def run_in_vllm(code, *arguments, **environment):
    """What `python -c CODE ARGUMENTS` prints."""
    chosen = {**SETTINGS, **environment}
    program = Forked(INSPECT_HERE + code, *arguments, environment=chosen, server=VLLM)
    printed, said = program.communicate(timeout=900)
    assert program.returncode == 0, said[-4000:]
    return printed

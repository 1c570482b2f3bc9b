"""The backends that the tests of a kind compare with the reference."""

import pytest

from fulmen.ops.dispatch import BACKEND_VARIABLE, pin_backend
from fulmen.ops.native_library import native_reason


@pytest.fixture(scope="module", params=["cpu", "native"])
def backend(request):
    """Plain torch; and native wherever it has a kernel, which is then the default."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(BACKEND_VARIABLE, raising=False)
        if request.param == "cpu":
            with pin_backend("cpu"):
                yield "cpu"
        else:
            if reason := native_reason():
                pytest.skip(f"native: {reason}")
            yield "native"

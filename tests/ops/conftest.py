"""The backends that the tests of a kind compare with the reference."""

import pytest

from fulmen.ops.dispatch import BACKEND_VARIABLE, pin_backend
from tests.ops.native_levels import EACH_LEVEL, native_level


@pytest.fixture(scope="module", params=["cpu", *EACH_LEVEL])
def backend(request):
    """Plain torch; and native wherever it has a kernel, which is then the default, at each level."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(BACKEND_VARIABLE, raising=False)
        if request.param == "cpu":
            with pin_backend("cpu"):
                yield "cpu"
        else:
            with native_level(request.param):
                yield "native"

"""The backends that the tests of a kind compare with the reference."""

import pytest

from fulmen.ops.dispatch import BACKEND_VARIABLE, pin_backend
from tests.ops.cpp_levels import EACH_LEVEL, cpp_level


@pytest.fixture(scope="module", params=["torch", *EACH_LEVEL])
def backend(request):
    """Plain torch; and cpp wherever it has a kernel, which is then the default, at each level."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(BACKEND_VARIABLE, raising=False)
        if request.param == "torch":
            with pin_backend("torch"):
                yield "torch"
        else:
            with cpp_level(request.param):
                yield "cpp"

"""Whether Triton interprets its kernels; importable without Triton."""

import os

# Triton's own variable: its kernels are then computed by NumPy, on any device, for tests.
INTERPRET_VARIABLE = "TRITON_INTERPRET"


def is_interpreted() -> bool:
    """Whether Triton interprets its kernels. It reads the variable when it is imported: set it before."""
    return os.environ.get(INTERPRET_VARIABLE, "").lower() in ("1", "true", "yes", "on", "y")

"""How a trainer says what it is at between its steps: validation, asking the teacher, timing a step."""

from collections.abc import Callable

# Called with (done, total, what).
OnPart = Callable[[int, int, str], None]

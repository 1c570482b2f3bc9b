"""What a command says on stderr, whatever the speed of the machine."""


def lines_that_stay(stderr: str) -> list[str]:
    """All lines but those on how far work of several seconds is, which a slow machine has more of."""
    return [line for line in stderr.splitlines() if " elapsed" not in line]

"""Replies that a library's scorer would evaluate as Python: which ones it may be given.

Some of reasoning-gym's scorers call `eval`, or SymPy's parser, which does, on what the model wrote.
"""

import ast

FUNCTIONS = {"sin", "cos", "tan", "exp", "log", "sqrt", "asin", "acos", "atan", "sinh", "cosh", "tanh", "Abs"}
_ALLOWED = (
    *(
        ast.Expression,
        ast.Constant,
        ast.Name,
        ast.Load,
        ast.List,
        ast.Tuple,
        ast.Call,
        ast.BinOp,
        ast.UnaryOp,
    ),
    *(ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow, ast.unaryop),
)
_LONGEST = 10_000
_LARGEST_EXPONENT = 99


def is_harmless(text: str) -> bool:
    """Whether evaluating a text does no more than arithmetic, or makes a list, and ends soon.

    What is no Python expression is harmless as long as nothing in it is called.
    """
    if len(text) > _LONGEST:
        return False
    try:
        nodes = list(ast.walk(ast.parse(text.strip(), mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "(" not in text and "__" not in text
    return all(map(_is_plain, nodes)) and all(map(_is_small_power, nodes)) and not _multiplies_lists(nodes)


def _is_plain(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS and not node.keywords
    if isinstance(node, ast.Name):
        return "__" not in node.id  # it is not called
    return isinstance(node, _ALLOWED)


def _is_small_power(node: ast.AST) -> bool:
    """Whether it is no power, or one that ends in time: (x**2 + 1)**3 does, 9**9**9 does not."""
    if not _is_power(node):
        return True
    assert isinstance(node, ast.BinOp)
    exponents = [one.value for one in ast.walk(node.right) if isinstance(one, ast.Constant)]
    deeper = [one for one in ast.walk(node.left) if _is_power(one)]
    return (
        not any(map(_is_power, ast.walk(node.right)))
        and all(isinstance(one, int) and one <= _LARGEST_EXPONENT for one in exponents)
        and not any(_is_power(one) for power in deeper for one in ast.walk(power.left))  # type: ignore[attr-defined]
    )


def _is_power(node: ast.AST) -> bool:
    return isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow)


def _multiplies_lists(nodes: list[ast.AST]) -> bool:
    """Whether there may be a list or a text that is repeated until it fills the memory."""
    has_sequence = any(
        isinstance(node, (ast.List, ast.Tuple))
        or (isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes)))
        for node in nodes
    )
    return has_sequence and any(isinstance(node, ast.BinOp) for node in nodes)

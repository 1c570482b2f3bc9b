"""The words of needle tasks, and where a question ends and its answer begins, to the token."""

from typing import Any

from fulmen.data import token_ids

NEEDLE = "\n\nThe secret number of {name}: {number}\n\n"
QUESTION = (
    "\n\nQuestion: which number is next to {name} in the text above?\nAnswer: The secret number of {name}:"
)


def split_answer(tokenizer: Any, question: str, answer: str) -> tuple[list[int], list[int]]:
    """The tokens of both. A token across their border, which some tokenizers make, belongs to the answer."""
    head, both = token_ids(tokenizer, question), token_ids(tokenizer, f"{question} {answer}")
    border = len(head)
    while head[:border] != both[:border]:
        border -= 1
    return both[:border], both[border:]

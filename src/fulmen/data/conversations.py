"""Questions and answers about a text, as a model expects them: by its chat template, or as plain examples."""

from collections.abc import Sequence
from datetime import datetime
from itertools import product
from typing import Any, NamedTuple, Protocol

from fulmen.data.sequences import opening_ids, token_ids
from fulmen.errors import ConfigError, one_line

# Stands for what a user says while a template is tried out.
PROBE_CONTENT = "fulmenprobe"
SYSTEM = "You are a helpful assistant."
# Templates that show today's date show this one: texts are the same every day.
TODAY = datetime(2025, 1, 1)

# (question, answer)
Turn = tuple[str, str]


class Frame(NamedTuple):
    """What a user writes before a text, and between it and the first question."""

    before: str
    between: str


# Of what is judged. Without one, models go on with a text of code, or answer in code, at any attention.
FRAME = Frame("Read the text below and answer the question that follows it.\n\n", "\n\nQuestion: ")


class Example(NamedTuple):
    """A worked example: a short text with a question about it, and its answer."""

    text: str
    question: str
    answer: str


class ConversationFormat(Protocol):
    """How a text, and questions and answers about it, are written for one model.

    Attributes:
        is_chat: whether questions may carry a request to a chat model.
    """

    is_chat: bool

    def prompt(self, text: str, turns: Sequence[Turn], question: str) -> str:
        """A conversation up to where the answer begins."""
        ...

    def whole(self, text: str, turns: Sequence[Turn]) -> str:
        """A conversation that is over."""
        ...

    def ids(self, rendered: str) -> list[int]:
        """The tokens of what the other two return."""
        ...

    def answer_text(self, answer: str) -> str:
        """What is written for an answer where `prompt` ends."""
        ...


def conversation_format(
    tokenizer: Any, examples: Sequence[Example] = (), frame: Frame = FRAME
) -> ConversationFormat:
    """By the tokenizer's chat template; worked examples in plain text where it has none.

    Args:
        examples: what plain text begins with. frame: for a chat model.

    Raises ConfigError if the template cannot write what a user says.
    """
    return ChatFormat(tokenizer, frame) if tokenizer.chat_template else PlainFormat(tokenizer, examples)


def keeps_turns(format: ConversationFormat) -> bool:
    """Whether a turn stays as it was when others follow: many templates drop what was thought before."""
    turns = [(f"question {number}", f"answer {number}") for number in range(3)]
    whole = format.whole("text", turns)
    asked = (format.prompt("text", turns[:place], turn[0]) for place, turn in enumerate(turns))
    return all(
        whole.startswith(prompt + format.answer_text(answer))
        for prompt, (_, answer) in zip(asked, turns, strict=True)
    )


class ChatFormat:
    """By a chat template, without thinking, tools or (where the template allows) a system message.

    Every conversation is rendered whole: whatever the template does to earlier turns is in it.
    """

    is_chat = True

    def __init__(self, tokenizer: Any, frame: Frame = FRAME) -> None:
        """Raises ConfigError: the template refuses, or leaves out, what a user says."""
        self.tokenizer, self.frame = tokenizer, frame
        self.tools: list[Any] | None
        errors = []
        for self.parts, self.system, self.tools in product((False, True), ((), (SYSTEM,)), (None, [])):
            try:
                rendered = self.prompt(PROBE_CONTENT, (), PROBE_CONTENT)
            except Exception as error:  # whatever a template raises
                errors.append(one_line(error))
                continue
            if rendered.count(PROBE_CONTENT) == 2:
                return
            errors.append("it leaves out what the user says")
        raise ConfigError(
            f"the chat template cannot write what a user asks ({errors[0]}); "
            "fix or remove the tokenizer's chat_template, or ask nothing"
        )

    def prompt(self, text: str, turns: Sequence[Turn], question: str) -> str:
        """A conversation up to where the assistant's answer begins."""
        return self._render(text, [*(part for turn in turns for part in turn), question], True)

    def whole(self, text: str, turns: Sequence[Turn]) -> str:
        """A conversation that is over."""
        return self._render(text, [part for turn in turns for part in turn], False)

    def ids(self, rendered: str) -> list[int]:
        """Its tokens; BOS is in the template or nowhere, as in `apply_chat_template`."""
        return token_ids(self.tokenizer, rendered)

    def answer_text(self, answer: str) -> str:
        """The answer as it is."""
        return answer

    def _render(self, text: str, said: Sequence[str], opens_answer: bool) -> str:
        first, *others = said
        contents = [f"{self.frame.before}{text}{self.frame.between}{first}", *others]
        roles = ["user" if place % 2 == 0 else "assistant" for place in range(len(contents))]
        messages = [self._message("system", content) for content in self.system]
        messages += [self._message(role, content) for role, content in zip(roles, contents, strict=True)]
        rendered: str = self.tokenizer.apply_chat_template(
            messages,
            tools=self.tools,
            tokenize=False,
            add_generation_prompt=opens_answer,
            enable_thinking=False,
            thinking=False,
            date_string=TODAY.strftime("%d %b %Y"),
            strftime_now=TODAY.strftime,
        )
        return rendered

    def _message(self, role: str, content: str) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": content}] if self.parts else content}


class PlainFormat:
    """For a model without a template: worked examples with texts of their own, the text, and questions."""

    is_chat = False

    def __init__(self, tokenizer: Any, examples: Sequence[Example]) -> None:
        self.tokenizer = tokenizer
        self.before = "".join(f"Text: {text}\n\n{_turn(*turn)}\n\n" for text, *turn in examples)

    def prompt(self, text: str, turns: Sequence[Turn], question: str) -> str:
        """A conversation up to "Answer:"."""
        return f"{self._start(text, turns)}Question: {question}\nAnswer:"

    def whole(self, text: str, turns: Sequence[Turn]) -> str:
        """A conversation and the empty line behind it."""
        return self._start(text, turns)

    def ids(self, rendered: str) -> list[int]:
        """Its tokens, behind BOS if this tokenizer writes one."""
        return opening_ids(self.tokenizer) + token_ids(self.tokenizer, rendered)

    def answer_text(self, answer: str) -> str:
        """Behind a blank."""
        return f" {answer}"

    def _start(self, text: str, turns: Sequence[Turn]) -> str:
        return f"{self.before}Text: {text}\n\n" + "".join(f"{_turn(*turn)}\n\n" for turn in turns)


def _turn(question: str, answer: str) -> str:
    return f"Question: {question}\nAnswer: {answer}"

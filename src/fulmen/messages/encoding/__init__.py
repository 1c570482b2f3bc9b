"""DeepSeek-V3.2's chat format (DSML): thinking, tools, and calls of several tools within one turn.

encode(messages, tools=tools, thinking=True)    # the text that a model reads
decode(text)                                    # the message that it wrote
ReplyParser(thinking=True).feed(piece)          # the same, piece by piece
"""

from fulmen.messages.encoding.prompt import encode
from fulmen.messages.encoding.reply import ReplyParser, decode, joined

__all__ = ["ReplyParser", "decode", "encode", "joined"]

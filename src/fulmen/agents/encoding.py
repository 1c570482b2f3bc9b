"""DeepSeek-V3.2's chat format: what `fulmen.messages.encoding` has, where agents look for it."""

from fulmen.messages.encoding import ReplyParser, decode, encode, joined

__all__ = ["ReplyParser", "decode", "encode", "joined"]

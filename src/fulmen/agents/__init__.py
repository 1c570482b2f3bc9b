"""Agents over long contexts: how a model reads and writes tool calls, and what it keeps of a long history.

    encoding      DeepSeek-V3.2's chat format: messages to text, a model's reply to a message
    strategies    what stays of a history that outgrows the context
    documents     a folder that a model lists, searches and opens
    replay        what recorded calls would have cost under a strategy

The first two stand in `fulmen.messages`, which serving and training use too. Messages are plain dicts in the
shape of OpenAI's chat completions. It needs neither torch nor a model.
"""

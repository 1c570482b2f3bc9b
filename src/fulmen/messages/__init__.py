"""Chat messages in the shape of OpenAI's chat completions, as plain dicts. No torch, no model.

message       their text, their calls, and which results answer which
encoding      DeepSeek-V3.2's chat format: messages to text, a model's reply to a message
strategies    what stays of a history that outgrows the context
"""

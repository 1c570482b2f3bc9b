"""The fixed texts of DeepSeek-V3.2's chat format, to the byte.

Source: the file encoding/encoding_dsv32.py beside the published weights of DeepSeek-V3.2; the format is
called DSML there.
"""

DSML = "｜DSML｜"
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
CALLS_OPEN, CALLS_CLOSE = f"<{DSML}function_calls>", f"</{DSML}function_calls>"
# The tags with attributes, up to these.
INVOKE, INVOKE_CLOSE = f"<{DSML}invoke", f"</{DSML}invoke>"
PARAMETER, PARAMETER_CLOSE = f"<{DSML}parameter", f"</{DSML}parameter>"
RESULTS_OPEN, RESULTS_CLOSE = "<function_results>", "</function_results>"
RESULT_OPEN, RESULT_CLOSE = "<result>", "</result>"

BEFORE_USERS_MESSAGE = "\n\n# The user's message is: "
BEFORE_SCHEMA = "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"

# What the model was trained to read before and after the tools' JSON.
BEFORE_TOOLS = f"""## Tools
You have access to a set of tools you can use to answer the user's question.
You can invoke functions by writing a "{CALLS_OPEN}" block like the following as part of your reply \
to the user:
{CALLS_OPEN}
{INVOKE} name="$FUNCTION_NAME">
{PARAMETER} name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE{PARAMETER_CLOSE}
...
{INVOKE_CLOSE}
{INVOKE} name="$FUNCTION_NAME2">
...
{INVOKE_CLOSE}
{CALLS_CLOSE}
String and scalar parameters should be specified as is without any escaping or quotes, while lists and \
objects should use JSON format. The "string" attribute should be set to "true" for string type parameters \
and "false" for other types (numbers, booleans, arrays, objects).
If the thinking_mode is enabled, then after function results you should strongly consider outputting a \
thinking block. Here is an example:
{CALLS_OPEN}
...
{CALLS_CLOSE}
{RESULTS_OPEN}
...
{RESULTS_CLOSE}
{THINK_OPEN}...thinking about results{THINK_CLOSE}
Here are the functions available in JSONSchema format:
<functions>
"""
AFTER_TOOLS = "\n</functions>\n"

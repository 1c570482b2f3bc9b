"""Calls that a request forces or calls strict: the engine holds their arguments to the tool's schema.

vLLM does so for tools that say `strict: true`, and leaves the arguments of others free even where it forces
the call; so a tool that has to be called becomes strict on its way to the engine.
"""

from typing import Any

from fulmen.serving.gateway.errors import ApiError
from fulmen.serving.gateway.schemas.json_schema import (
    ALTERNATIVES,
    FieldSchema,
    check_schema,
    check_size,
    enforceable,
    subschemas,
)

# A function without parameters takes none, as OpenAI has it.
NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}
_ANSWER = "response_format.json_schema.schema"
_PARAMETERS, _INPUT = "tools[{}].function.parameters", "tools[{}].input_schema"


def enforce_chat(body: dict[str, Any]) -> None:
    """Make the engine's body for a chat hold forced and strict calls, and its answer, to their schemas.

    Raises ApiError 422 for a schema that is none or cannot be enforced, and for a choice that no tool meets.
    """
    functions = [tool["function"] for tool in body.get("tools", [])]
    answer = [FieldSchema(_ANSWER, schema) for schema in _answer_schemas(body)]
    check_size([*_parameters(functions), *answer])
    choice = body.get("tool_choice")
    named = choice["function"]["name"] if isinstance(choice, dict) else None
    forced = _forced(functions, named, choice == "required")
    for index, function in enumerate(functions):
        field, strict = _PARAMETERS.format(index), bool(function.get("strict"))
        check_schema(function.get("parameters", {}), field)
        if strict:
            check_strict(function.get("parameters", {}), field)
        if index in forced or (strict and choice != "none"):
            _hold(function, "parameters", field)
    for field, schema in answer:
        check_schema(schema, field)
        enforceable(schema, field)


def enforce_messages(body: dict[str, Any]) -> None:
    """The same for Anthropic's messages; what is no tool at all is left to the engine, which says so."""
    _refuse_tools_in_messages(body["messages"])
    tools = [tool if isinstance(tool, dict) else {} for tool in body.get("tools", [])]
    check_size(
        FieldSchema(_INPUT.format(index), tool.get("input_schema")) for index, tool in enumerate(tools)
    )
    kind, named = (body.get("tool_choice", {}).get(key) for key in ("type", "name"))
    forced = _forced(tools, named if kind == "tool" else None, kind == "any")
    for index, tool in enumerate(tools):
        field = _INPUT.format(index)
        if not isinstance(strict := tool.get("strict", False), bool):
            raise ApiError(422, f"tools[{index}].strict={strict!r:.80} is neither true nor false", field)
        if isinstance(tool.get("input_schema"), dict):
            check_schema(tool["input_schema"], field)
            if index in forced or (strict and kind != "none"):
                _hold(tool, "input_schema", field)


def enforced_schemas(body: dict[str, Any]) -> list[FieldSchema]:
    """The schemas that the engine will make grammars of, for an engine's body of either kind."""
    choice = body.get("tool_choice")
    found = [FieldSchema(_ANSWER, schema) for schema in _answer_schemas(body)]
    if (choice.get("type") if isinstance(choice, dict) else choice) == "none":
        return found
    for index, tool in enumerate(body.get("tools", [])):
        function = tool.get("function", tool) if isinstance(tool, dict) else {}
        if function.get("strict"):
            of_anthropic = "input_schema" in function
            field, key = (_INPUT, "input_schema") if of_anthropic else (_PARAMETERS, "parameters")
            found.append(FieldSchema(field.format(index), function.get(key, {})))
    return found


def check_strict(parameters: dict[str, Any], field: str) -> None:
    """DeepSeek's rules for strict tools: an object requires all its properties and allows no other.

    Raises ApiError 422 that names the field.
    """
    for index, node in subschemas(parameters, field):
        properties = node.get("properties", {})
        if missing := sorted(set(properties) - set(node.get("required", []))):
            raise ApiError(
                422, f"{index}.required lacks {missing[:20]}; strict tools require every property", index
            )
        if properties and node.get("additionalProperties") is not False:
            raise ApiError(422, f"{index}.additionalProperties must be false for a strict tool", index)


def _answer_schemas(body: dict[str, Any]) -> list[dict[str, Any]]:
    asked = body.get("response_format", {}).get("json_schema", {})
    return [asked["schema"]] if "schema" in asked else []


def _parameters(functions: list[dict[str, Any]]) -> list[FieldSchema]:
    return [
        FieldSchema(_PARAMETERS.format(index), function.get("parameters", {}))
        for index, function in enumerate(functions)
    ]


def _refuse_tools_in_messages(messages: list[dict[str, Any]]) -> None:
    """vLLM takes tools from inside messages too; Anthropic does not."""
    for index, message in enumerate(messages):
        content = message.get("content")
        for part in content if isinstance(content, list) else []:
            if isinstance(part, dict) and part.get("type") in ("tool_addition", "tool_removal"):
                field = f"messages[{index}].content"
                raise ApiError(422, f"{field} has a {part['type']}; send all tools as tools", field)


def _forced(functions: list[dict[str, Any]], named: Any, any_of_them: bool) -> set[int]:
    """The indices of the tools of which one has to be called."""
    if any_of_them and not functions:
        raise ApiError(422, "tool_choice asks for a call, and there are no tools; send tools", "tool_choice")
    if any_of_them:
        return set(range(len(functions)))
    indices = {index for index, function in enumerate(functions) if function.get("name") == named}
    if named is not None and not indices:
        raise ApiError(422, f"tool_choice names {named!r:.80}, which is none of the tools", "tool_choice")
    return indices if named is not None else set()


def _hold(function: dict[str, Any], key: str, field: str) -> None:
    """Have the engine enforce the schema of a function's arguments, which are an object."""
    schema = function.get(key, NO_PARAMETERS)
    kind = schema.get("type", "object")
    if "object" not in (kind if isinstance(kind, list) else [kind]):
        raise ApiError(422, f"{field}.type={kind!r} is no object, which arguments are", field)
    if not any(alternative in schema for alternative in ALTERNATIVES):
        schema = {**schema, "type": "object"}
    function |= {"strict": True, key: schema}
    enforceable(schema, field)

"""What a request's JSON schemas may be: bounded before anything walks them, enforced in full or refused.

Sources: JSON Schema 2020-12 for the keywords; what XGrammar makes of each was tried with version 0.2.8, the
compiler behind vLLM's structured output.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from jsonschema_rs import Draft202012Validator, ValidationError

from fulmen.serving.gateway.errors import ApiError

# vLLM refuses a schema of 64 levels, and XGrammar follows each by a call of its own.
MAX_DEPTH = 50
# Of all schemas of a request together: values of any kind, and characters of names and strings.
MAX_VALUES, MAX_CHARACTERS = 100_000, 2_000_000
# Of the schemas that an answer is held to, as OpenAI counts them.
MAX_PROPERTIES, MAX_ENUM, MAX_ENUM_CHARACTERS = 1_000, 1_000, 120_000
MAX_PATTERN = 2_000

_META = Draft202012Validator({"$ref": "https://json-schema.org/draft/2020-12/schema"})
# Where a schema has schemas inside: by name, in a list, or one.
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTED = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLE = ("items", "additionalProperties", "propertyNames", "contains", "not", "if", "then", "else")
# XGrammar passes over these in silence.
_UNENFORCED = (
    *("not", "if", "then", "else", "dependentSchemas", "dependentRequired", "contains", "minContains"),
    *("maxContains", "uniqueItems", "multipleOf", "unevaluatedItems", "unevaluatedProperties"),
    *("$dynamicRef", "$recursiveRef"),
)
ALTERNATIVES = ("$ref", "anyOf", "oneOf", "allOf")
# And over these where an alternative stands beside them.
_LOST_BESIDE = (
    *("properties", "required", "additionalProperties", "patternProperties", "propertyNames"),
    *("minProperties", "maxProperties", "items", "prefixItems", "minItems", "maxItems", "enum", "const"),
    *("pattern", "minLength", "maxLength", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
)
# What decides the type of a value as well as `type` does.
_VALUES = ("enum", "const", *ALTERNATIVES)
_LOOKS_AROUND = re.compile(r"\(\?<?[=!]")
_LENGTHS = ("minLength", "maxLength")
_FORMATS = (
    *("email", "date", "time", "date-time", "duration", "ipv4", "ipv6", "hostname", "uuid", "uri"),
    *("uri-reference", "uri-template", "json-pointer", "relative-json-pointer"),
)


class FieldSchema(NamedTuple):
    """A schema that the engine holds an answer to, and the request's field that it stands in."""

    field: str
    schema: Any


def check_size(schemas: Iterable[FieldSchema]) -> None:
    """Raise ApiError 422 for schemas that are deeper or have more in them than anything should walk."""
    values = characters = 0
    for field, schema in schemas:
        level: list[Any] = [schema]
        depth = 0
        while level:
            depth, values = depth + 1, values + len(level)
            characters += sum(len(value) for value in level if isinstance(value, str))
            if depth > MAX_DEPTH:
                raise ApiError(422, f"{field} is nested deeper than {MAX_DEPTH} levels; flatten it", field)
            if values > MAX_VALUES or characters > MAX_CHARACTERS:
                most = f"{MAX_VALUES:,} values or {MAX_CHARACTERS:,} characters"
                raise ApiError(422, f"{field}: the request's schemas have more than {most}; send less", field)
            level = [inner for value in level for inner in _inside(value)]


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return (*value, *value.values())
    return value if isinstance(value, list) else ()


def check_schema(schema: dict[str, Any], field: str) -> None:
    """Raise ApiError 422 unless it is a JSON schema. It has passed `check_size`."""
    try:
        _META.validate(schema)
    except ValidationError as error:
        inside = "".join(f"[{part!r}]" for part in error.instance_path)
        why = f"{field}{inside} is no JSON schema: {error.message[:200]}"
        raise ApiError(422, why, field) from error
    except ValueError as error:
        raise ApiError(422, f"{field} is no JSON schema: {str(error)[:200]}", field) from error


def subschemas(schema: Any, place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """All schemas inside, itself first, with their places. The schema is one, and of bounded depth."""
    if not isinstance(schema, dict):
        return
    yield place, schema
    for key in _NAMED:
        for name, inner in schema.get(key, {}).items():
            yield from subschemas(inner, f"{place}.{key}.{name}")
    for key in _LISTED:
        for index, inner in enumerate(schema.get(key, [])):
            yield from subschemas(inner, f"{place}.{key}[{index}]")
    for key in _SINGLE:
        yield from subschemas(schema.get(key), f"{place}.{key}")


def enforceable(schema: dict[str, Any], field: str) -> None:
    """Make sure that an answer can be held to the schema, word for word.

    A `format` that XGrammar does not know, or would put in the place of a length, is taken out: JSON Schema
    calls it a note. Raises ApiError 422 that names the place of anything else that would be passed over, and
    of what is more than a grammar should have.
    """
    properties = values = characters = 0
    for place, node in subschemas(schema, field):
        if why := _unenforced(node):
            raise ApiError(422, f"{place}{why}", field)
        if node.get("format") not in _FORMATS or any(key in node for key in (*_LENGTHS, "pattern")):
            node.pop("format", None)
        properties += len(node.get("properties", {}))
        values += len(node.get("enum", []))
        characters += sum(len(str(value)) for value in node.get("enum", []))
        for count, most, what in (
            (properties, MAX_PROPERTIES, "properties"),
            (values, MAX_ENUM, "enum values"),
            (characters, MAX_ENUM_CHARACTERS, "characters in its enum values"),
            (len(node.get("pattern", "")), MAX_PATTERN, "characters in a pattern"),
        ):
            if count > most:
                raise ApiError(422, f"{field} has more than {most:,} {what}, the limit", field)


def _unenforced(node: dict[str, Any]) -> str | None:
    """What of a schema an answer would not be held to: the end of a sentence that begins with its place."""
    if lost := next((key for key in _UNENFORCED if key in node and not _says_nothing(key, node[key])), None):
        return f".{lost} cannot be enforced; leave it out"
    reference = node.get("$ref", "#")
    if reference != "#" and not reference.startswith("#/"):
        return f".$ref={reference[:80]!r} is not in the schema; put it under $defs"
    if len(node.get("allOf", [])) > 1:
        return ".allOf of more than one schema cannot be enforced; merge them"
    if chosen := next((key for key in ALTERNATIVES if key in node), None):
        lost = next((key for key in _LOST_BESIDE if key in node), None)
        if lost is None and "type" in node and not (chosen == "$ref" or all(map(_says_type, node[chosen]))):
            lost = "type"
        if lost is not None:
            return f".{lost} cannot be enforced beside {chosen}; put it into each alternative"
    if "pattern" in node and (length := next((key for key in _LENGTHS if key in node), None)):
        return f".{length} cannot be enforced beside pattern; write it into the pattern"
    if _LOOKS_AROUND.search(node.get("pattern", "")):
        return ".pattern looks ahead or behind, which cannot be enforced; write it without"
    return _unenforced_names(node)


def _says_nothing(key: str, value: Any) -> bool:
    """Of a keyword that is not enforced: an object is closed anyway where its properties are named."""
    return value is False and key in ("uniqueItems", "unevaluatedProperties")


def _says_type(node: Any) -> bool:
    return not isinstance(node, dict) or any(key in node for key in ("type", "properties", *_VALUES))


def _unenforced_names(node: dict[str, Any]) -> str | None:
    """The same of an object's properties."""
    named, patterns = node.get("properties", {}), node.get("patternProperties", {})
    if len(patterns) > 1 or (patterns and named):
        return ".patternProperties cannot be enforced beside other properties; name them all"
    if "propertyNames" in node and (named or patterns):
        return ".propertyNames cannot be enforced beside properties; leave it out"
    if missing := sorted(set(node.get("required", [])) - set(named)):
        return f".required has {missing[:3]}, which its properties lack; describe them there"
    return None

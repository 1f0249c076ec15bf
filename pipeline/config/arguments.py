"""Values that people write in YAML and on the command line: read by a declared type, described, given to functions."""

import difflib
import inspect
import json
import pkgutil
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

NULLS = (None, "", "null", "~")
NAME_PATTERN = "^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$"
WORDS = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "string": "text",
    "path": "a path",
    "array": "a list in brackets",
    "object": "names and their values, such as {size: 32}",
}
PLAIN_FORMS = {
    "null": "null|~|",
    "bool": "true|false",
    "int": "[-+]?(0|[1-9][0-9]*)",
    "float": "[-+]?([0-9]+[.][0-9]*|[.][0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?",
}
BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a config; `keys` are all the settings that take part in it."""

    keys: tuple[str, ...]
    message: str


def resolve(name: str) -> Callable[..., Any]:
    """Return what "package.module:function" names; packages in the current folder are found too.

    Raises ValueError that says why there is no such function.
    """
    if not all(name.partition(":")):
        raise ValueError(f"{name} is not of the form package.module:function")
    if (folder := str(Path.cwd())) not in sys.path:
        sys.path.append(folder)  # it stays, as the module may import its neighbours later
    try:
        function: Callable[..., Any] = pkgutil.resolve_name(name)
    except Exception as error:  # importing runs code that is not ours
        raise ValueError(f"{name} cannot be imported ({type(error).__name__}: {error})") from error
    if not callable(function):
        raise ValueError(f"{name} is no function, it is of type {type(function).__name__}")
    return function


def check_arguments(
    key: str, function: Callable[..., Any], given: Mapping[str, Any], provided: Collection[str], *, name: str = ""
) -> Iterator[Problem]:
    """Yield what is wrong with the arguments `given` under `key`, such as data.arguments.

    `provided` are the parameters that the program gives. `name` is what the config calls the function.
    """
    parameters, is_open = _parameters(function)
    name = name or getattr(function, "__name__", "the function")
    for missing in () if is_open else [part for part in provided if part not in parameters]:
        yield Problem((key,), f"{name} takes no {missing}: it is called with {', '.join(provided)} and {key}")
    settable = {part: parameter for part, parameter in parameters.items() if part not in provided}
    for argument, value in given.items():
        keys, setting = (f"{key}.{argument}",), f"{key}.{argument} = {show(value)}"
        if argument in settable:
            try:
                _convert(value, settable[argument])
            except ValidationError:
                yield Problem(keys, f"{setting}: accepted: {describe_accepted(settable[argument].annotation)}")
        elif argument in provided:
            yield Problem(keys, f"{setting}: cannot be set, as it follows from other keys")
        elif not is_open:
            takes = ", ".join(settable) or "no arguments"
            near = difflib.get_close_matches(argument, settable, n=1)
            hint = f"; did you mean {key}.{near[0]}?" if near else ""
            yield Problem(keys, f"{setting}: unknown; {name} takes {takes}{hint}")
    for argument, parameter in settable.items():
        if parameter.default is parameter.empty and argument not in given:
            needs = f"{name} needs it; accepted: {describe_accepted(parameter.annotation)}"
            yield Problem((f"{key}.{argument}", key), f"{key}.{argument}: is missing, {needs}")


def convert_arguments(
    function: Callable[..., Any], given: Mapping[str, Any], provided: Collection[str]
) -> dict[str, Any]:
    """Return `given` as the parameters' annotations want it; where there is none, text is read as YAML.

    Raises ValueError that names all that does not fit.
    """
    if problems := [problem.message for problem in check_arguments("arguments", function, given, provided)]:
        raise ValueError("; ".join(problems))
    parameters, _ = _parameters(function)
    return {name: _convert(value, parameters.get(name)) for name, value in given.items()}


def _parameters(function: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], bool]:
    """Return the parameters that can be given by name, and whether any other name is taken too."""
    try:
        signature = inspect.signature(function, eval_str=True)
    except Exception:  # annotations that only a type checker can resolve: then they count as none
        signature = inspect.signature(function)
    kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = {name: signature.parameters[name] for name, kind in kinds.items() if kind in by_name}
    return parameters, inspect.Parameter.VAR_KEYWORD in kinds.values()


def _convert(value: Any, parameter: inspect.Parameter | None) -> Any:
    """Return `value` for the parameter; raises ValidationError if its annotation does not accept it.

    A value is taken as it is, or else as its text is read: 64 for text is "64", and true is no number.
    """
    annotation, default = (parameter.annotation, parameter.default) if parameter else (Any, None)
    adapter, schema = _understand(annotation)
    if not schema:
        return load_plain(value)
    if value is None and default is None:  # `size: int = None`
        return None
    try:
        return adapter.validate_python(value, strict=True)
    except ValidationError:
        return adapter.validate_python(read_text(_write_plain(value), annotation))


def show(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def read_text(value: Any, annotation: Any) -> Any:
    """Return a text as what pydantic reads by the declared type: None, a list, a mapping or the text itself.

    `null` is None only where the type accepts it, so that a name may be `null`; a text that is no list is a list of
    one where a list is declared. What is not a text is returned as it is.
    """
    if not isinstance(value, str | None):
        return value
    _, schema = _understand(annotation)
    kinds = {member.get("type") for member in schema.get("anyOf", [schema])}
    if value in NULLS and kinds & {"null", "object"}:
        return None if "null" in kinds else {}
    loaded = _load(value, yaml.BaseLoader) if kinds & {"array", "object"} else None
    if isinstance(loaded, list | dict):
        return loaded
    return [value] if "array" in kinds and isinstance(value, str) else value


def load_plain(value: Any) -> Any:
    """Return `value` with each text in it loaded as YAML, of which `yes` and dates stay text."""
    return _map(lambda part: _load(part, _PlainLoader), value)


def read_plain(value: Any) -> Any:
    """Return `value` with each text that is YAML's own form of a number, boolean or null loaded.

    Nothing is lost, should text turn out to be declared. `1e-3` and `007` are not YAML's own form and stay text.
    """

    def read(part: Any) -> Any:
        plain = load_plain(part)
        return plain if isinstance(part, str) and _write_plain(plain) == part else part

    return _map(read, value)


def _write_plain(value: Any) -> Any:
    """Return `value` with each number, boolean and null in it as YAML's own text for it."""
    return _load(yaml.safe_dump(value), yaml.BaseLoader)


class _PlainLoader(yaml.SafeLoader):
    """Knows null, true, false and decimal numbers, `1e-3` among them; all else is text."""

    yaml_implicit_resolvers = {  # noqa: RUF012  # by the first character of a text: None is any
        None: [(f"tag:yaml.org,2002:{kind}", re.compile(f"^({form})$")) for kind, form in PLAIN_FORMS.items()]
    }


def _load(text: Any, loader: type[yaml.BaseLoader | yaml.SafeLoader]) -> Any:
    try:
        return yaml.load(text, Loader=loader) if isinstance(text, str) else text
    except yaml.YAMLError:
        return text


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    """Return `value` with `function` applied to all in it that is neither a mapping nor a list."""
    if isinstance(value, Mapping):
        return {str(name): _map(function, part) for name, part in value.items()}
    return [_map(function, part) for part in value] if isinstance(value, list | tuple) else function(value)


def describe_accepted(annotation: Any) -> str:
    """Return in words what a type takes: choices, or kind and bounds."""
    return _describe(_understand(annotation)[1])


def _describe(schema: JsonSchemaValue) -> str:
    members = schema.get("anyOf", [schema])
    kinds = [_describe_member(member) for member in members if member.get("type") != "null"]
    return " or ".join(kinds) + (", or null" if len(kinds) < len(members) else "")


def _describe_member(schema: JsonSchemaValue) -> str:
    if choices := schema.get("enum") or ([schema["const"]] if "const" in schema else []):
        return " | ".join(str(choice) for choice in choices)
    kind = str(schema.get("format", schema.get("type", schema.get("$ref", "anything")))).rpartition("/")[2]
    words = WORDS.get(kind, kind)
    if limits := [f"{sign} {schema[bound]:g}" for bound, sign in BOUNDS.items() if bound in schema]:
        words += f" {' and '.join(limits)}"
    if "maxLength" in schema:
        words += f" of 1 to {schema['maxLength']} characters"
    if pattern := schema.get("pattern"):
        name = "of letters, digits, '.', '_' and '-', at most 128, not beginning with '.' or '-'"
        words += f" {name}" if pattern == NAME_PATTERN else f" that matches {pattern}"
    items = [f"each {_describe(schema['items'])}"] if schema.get("items") else []
    return ", ".join([words, *items, *(_describe(item) for item in schema.get("prefixItems", ()))])


class _SchemaGenerator(GenerateJsonSchema):
    def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> JsonSchemaValue:
        return {"type": schema["type"]}  # of what JSON does not have, such as `callable`


def _understand(annotation: Any) -> tuple[TypeAdapter[Any], JsonSchemaValue]:
    """Return pydantic's reader of a type, and its JSON schema, which is empty for a type that takes anything."""
    try:
        adapter = TypeAdapter[Any](annotation, config=ConfigDict(allow_inf_nan=False))
        return adapter, adapter.json_schema(schema_generator=_SchemaGenerator)
    except (PydanticUserError, NameError):  # there is none, or one that pydantic knows nothing of
        return TypeAdapter(Any), {}

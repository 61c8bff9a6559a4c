"""A YAML file checked against a pydantic model, with every mistake named by FILE:LINE. Touches that file only."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

MAX_FILE_BYTES = 1 << 20

Where = tuple[str | int, ...]  # a path into the document: ("link", "prefill", 0, "bind")
M = TypeVar("M", bound=BaseModel)


class ConfigError(Exception):
    """A configuration file that cannot be used. `problems`: a line per mistake, each with FILE:LINE."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class YamlDocument:
    """Plain values of a YAML file and the line (from 1) on which each of them stands."""

    name: str
    data: dict[str, Any]
    lines: dict[Where, int] = field(default_factory=dict)

    def at(self, where: Where) -> str:
        """FILE:LINE of a value, or of the nearest thing around it."""
        while where and where not in self.lines:
            where = where[:-1]
        return f"{self.name}:{self.lines.get(where, 1)}"


def read_yaml(path: str | Path) -> YamlDocument:
    """Read a file whose top level is a mapping. Raises ConfigError."""
    path = Path(path)
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError([f"{path}: larger than {MAX_FILE_BYTES} bytes; this is no configuration file"])
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError([f"{path}: no such file"]) from None
    except IsADirectoryError:
        raise ConfigError([f"{path}: this is a folder, not a file"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: cannot be read: {error}"]) from None
    return parse_yaml(text, name=str(path))


def parse_yaml(text: str, *, name: str = "<yaml>") -> YamlDocument:
    """The same for text in memory. An empty document is an empty mapping."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return YamlDocument(name=name, data={}, lines={(): 1})
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError([f"{name}:1: expected `key: value` lines at the top level"])
        lines: dict[Where, int] = {}
        problems: list[str] = []
        data = _plain(loader, node, (), lines, problems, name)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise ConfigError([f"{name}:{line}: not valid YAML: {error.problem or error.context}"]) from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError([f"{name}:1: not valid YAML: {error}"]) from None
    finally:
        loader.dispose()
    if problems:
        raise ConfigError(problems)
    return YamlDocument(name=name, data=data, lines=lines)


def _plain(
    loader: yaml.SafeLoader,
    node: yaml.Node,
    where: Where,
    lines: dict[Where, int],
    problems: list[str],
    name: str,
) -> Any:
    lines.setdefault(where, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(loader, item, (*where, i), lines, problems, name) for i, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node)
    loader.flatten_mapping(node)
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = str(loader.construct_object(key_node))
        if isinstance(key_node, yaml.ScalarNode):
            key = str(key_node.value)  # as written: a name such as 007 or `on` is no number and no truth value
        line = key_node.start_mark.line + 1
        if key in values:
            problems.append(f"{name}:{line}: key `{key}` is already given on line {lines[(*where, key)]}")
            continue
        lines[(*where, key)] = line
        values[key] = _plain(loader, value_node, (*where, key), lines, problems, name)
    return values


def check(document: YamlDocument, model: type[M]) -> M:
    """The document as `model`. Raises ConfigError that names every mistake by line."""
    try:
        return model.model_validate(document.data)
    except ValidationError as error:
        raise ConfigError([_problem(document, model, dict(item)) for item in error.errors()]) from None


def _problem(document: YamlDocument, model: type[BaseModel], item: dict[str, Any]) -> str:
    where = _steps_in(document.data, item["loc"])
    if item["type"] == "extra_forbidden":
        known = _known_keys(model, where[:-1])
        hint = did_you_mean(str(where[-1]), known) or f"; known keys: {', '.join(known)}"
        return f"{document.at(where)}: unknown key `{where[-1]}`{hint}"
    shown = ".".join(str(step) for step in where)
    if item["type"] == "missing":
        missing = ".".join(str(step) for step in (*where, item["loc"][-1]))
        return f"{document.at(where)}: key `{missing}` is missing"
    if item["type"] in ("model_type", "dict_type"):
        return f"{document.at(where)}: `{shown}`: expected `key: value` lines (got {item['input']!r})"
    message = item["msg"].removeprefix("Value error, ")
    came = item.get("input")
    tail = f" (got {came!r})" if item["type"] != "value_error" and not isinstance(came, dict) else ""
    return f"{document.at(where)}: `{shown}`: {message}{tail}" if shown else f"{document.at(where)}: {message}"


def _steps_in(data: Any, loc: Where) -> Where:
    """The steps that lead somewhere: pydantic adds tags of unions and of keys to its paths."""
    where: Where = ()
    for step in loc:
        inside = data if isinstance(data, dict) else range(len(data)) if isinstance(data, list | tuple) else ()
        if step in inside:
            where, data = (*where, step), data[step]
    return where


def _known_keys(model: type[BaseModel], where: Where) -> list[str]:
    """The keys that may stand at a place; of the top level where a nested model cannot be told."""
    here: Any = model
    for step in where:
        if isinstance(step, int):
            continue
        annotation = here.model_fields[step].annotation if step in here.model_fields else None
        here = next((m for m in _models_in(annotation)), here)
    return list(here.model_fields)


def _models_in(annotation: Any) -> Iterable[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in getattr(annotation, "__args__", ()):
        yield from _models_in(part)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ "; did you mean `x`?" or nothing."""
    close = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.5)
    return f"; did you mean `{close[0]}`?" if close else ""

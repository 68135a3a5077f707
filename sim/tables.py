"""Reads parameters from TOML files, and refuses what is wrong with the file, the line and the field.

`read_toml(path, type)` gives a msgspec struct or raises `TableError` with "FILE:LINE: FIELD: what is wrong, what is
allowed". `override(struct, "a.b=value")` changes one field as the command line says it, with the same words.

Ranges are told by `msgspec.Meta` or by a ValueError of `__post_init__` that begins with the name of the field.
"""

import difflib
import math
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
from msgspec import inspect

Struct = TypeVar("Struct")
Place = tuple[str | int, ...]
"""Keys and indexes from the top of a document to a value."""

ENTRIES_MAX: Final = 10_000
"""Entries of one table whose key is sought when msgspec does not name it."""
OPTION: Final = "--set"

_TOKEN: Final = re.compile(
    r"(?P<space>[ \t\r]+|\#[^\n]*)"
    r'|(?P<text>"""(?:\\[\s\S]|[^\\])*?"""(?:"{0,2})|\'\'\'[\s\S]*?\'\'\'(?:\'{0,2})|"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\')'
    r"|(?P<mark>[\[\]{},=\n])"
    r'|(?P<bare>[^\s\[\]{},=\#"\']+)'
)
_WHERE: Final = re.compile(r"^(?P<what>.*?)(?: - at (?:`key` in )?`\$(?P<path>.*)`)?$", re.DOTALL)
_STEP: Final = re.compile(r"\.(?P<key>\w+)|\[(?P<index>\d+)\]|(?P<unnamed>\[\.\.\.\])")
_MISSING: Final = re.compile(r"Object missing required field `(\w+)`")
_UNKNOWN: Final = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_EXPECTED: Final = re.compile(r"Expected (?P<allowed>.*?)(?:, got (?P<got>.*))?$", re.DOTALL)
_SYNTAX_LINE: Final = re.compile(r"^(?P<what>.*) \(at (?:line (?P<line>\d+), column \d+|end of document)\)$", re.DOTALL)


class TableError(ValueError):
    """A file or an option that cannot be used: "FILE:LINE: FIELD: what is wrong, what is allowed"."""


def read_toml(path: Path, kind: type[Struct]) -> Struct:
    """Read a struct from a TOML file. Raises TableError, also for a file that cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = 1 + error.object[: error.start].count(b"\n")
        raise TableError(f"{path}:{line}: text: this is not UTF-8, which TOML has to be") from error
    except OSError as error:
        raise TableError(f"{path}: cannot be read: {error.strerror or error}") from error
    return parse_toml(text, kind, str(path))


def parse_toml(text: str, kind: type[Struct], name: str) -> Struct:
    """Read a struct from the text of a TOML file of this name. Raises TableError."""
    try:
        raw = tomllib.loads(text)
        lines = lines_of(text)
    except tomllib.TOMLDecodeError as error:
        raise TableError(_syntax(text, name, str(error))) from error
    except RecursionError as error:
        raise TableError(f"{name}:1: arrays and tables: nested too deeply to be read") from error
    try:
        return _converted(raw, kind)
    except _Wrong as wrong:
        place = wrong.place
        while place and place not in lines:
            place = place[:-1]
        raise TableError(f"{name}:{lines.get(place, 1)}: {wrong.text}") from wrong


def override(struct: Struct, assignment: str) -> Struct:
    """Return a struct with one field changed, as in "a.b=value" or "policies.0.max=9".

    The value is written as in TOML; quotes around a text may be left out, and a whole number may be written as 1e6.
    Raises TableError that names `--set`.
    """
    where, equals, text = assignment.partition("=")
    where, text = where.strip(), text.strip()
    option = f"{OPTION} {assignment}"
    if not equals or not where:
        raise TableError(f"{option}: write NAME=VALUE, where NAME is {_choice(_fields(type(struct), ()))}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        value = text
    raw = msgspec.to_builtins(struct)
    place: Place = tuple(int(part) if part.isdecimal() else part for part in where.split("."))
    _put(raw, place, value, type(struct), option)
    if isinstance(value, float) and value.is_integer() and _is_whole(type(struct), place):
        _put(raw, place, int(value), type(struct), option)
    try:
        return _converted(raw, type(struct))
    except _Wrong as wrong:
        raise TableError(f"{option}: {wrong.text}") from wrong


def lines_of(text: str) -> dict[Place, int]:
    """Return the line, from 1, of every key, table and array element of a valid TOML document."""
    found: dict[Place, int] = {(): 1}
    counts: dict[Place, int] = {}
    tokens = _Tokens(text)
    table: Place = ()
    while not tokens.ended:
        line = tokens.line
        if tokens.take("\n"):
            continue
        if tokens.take("["):
            doubled = tokens.take("[")
            table = _reached(_key(tokens, "]"), counts, new_element=doubled)
            tokens.take("]")
            _note(found, table, line)
        else:
            _pair(tokens, table, found)
    return found


class _Wrong(Exception):
    """What is wrong with a document: where, and "FIELD: what is wrong, what is allowed"."""

    def __init__(self, place: Place, what: str) -> None:
        self.place = place
        self.text = f"{_written(place) or 'the file'}: {what}"
        super().__init__(self.text)


class _Tokens:
    """The tokens of a document without blanks and comments, one ahead, and the line of the next one."""

    def __init__(self, text: str) -> None:
        self._matches = _lexed(text)
        self.line = 1
        self.next = ""
        self.ended = False
        self._advance(1)

    def _advance(self, line: int) -> None:
        for match in self._matches:
            if match.lastgroup == "space":
                continue
            self.next, self.line = match.group(), line
            return
        self.ended, self.next = True, ""

    def pop(self) -> str:
        """Return the next token and go on to the one behind it."""
        token = self.next
        self._advance(self.line + token.count("\n"))
        return token

    def take(self, token: str) -> bool:
        """Go on if this token is next, and say whether it was."""
        if self.ended or self.next != token:
            return False
        self.pop()
        return True

    def skip_lines(self) -> None:
        """Go on to the next token that is not a line end."""
        while self.take("\n"):
            pass


def _lexed(text: str) -> Iterator[re.Match[str]]:
    at = 0
    while at < len(text) and (match := _TOKEN.match(text, at)):
        at = match.end()
        yield match


def _key(tokens: _Tokens, until: str) -> list[str]:
    """Take a key up to a mark, with it, and return its parts; tomllib itself reads what is quoted and dotted."""
    written = ""
    while not tokens.ended and tokens.next != until:
        written += tokens.pop()
    tokens.take(until)
    parts = []
    value: Any = tomllib.loads(f"{written} = 0")
    while isinstance(value, dict):
        ((key, value),) = value.items()
        parts.append(key)
    return parts


def _reached(parts: list[str], counts: dict[Place, int], *, new_element: bool) -> Place:
    """Return the place of a header; a name of an array of tables on the way means its last element."""
    place: Place = ()
    for number, part in enumerate(parts, 1):
        place = (*place, part)
        if new_element and number == len(parts):
            counts[place] = counts.get(place, 0) + 1
        if place in counts:
            place = (*place, counts[place] - 1)
    return place


def _note(found: dict[Place, int], place: Place, line: int) -> None:
    """Note the line of a place, and of those around it that have none yet."""
    found[place] = line
    for length in range(len(place)):
        found.setdefault(place[:length], line)


def _pair(tokens: _Tokens, table: Place, found: dict[Place, int]) -> None:
    line = tokens.line
    place = (*table, *_key(tokens, "="))
    _note(found, place, line)
    _value(tokens, place, found)


def _value(tokens: _Tokens, place: Place, found: dict[Place, int]) -> None:
    if tokens.take("["):
        index = 0
        tokens.skip_lines()
        while not tokens.ended and not tokens.take("]"):
            _note(found, (*place, index), tokens.line)
            _value(tokens, (*place, index), found)
            index += 1
            tokens.skip_lines()
            tokens.take(",")
            tokens.skip_lines()
    elif tokens.take("{"):
        tokens.skip_lines()
        while not tokens.ended and not tokens.take("}"):
            _pair(tokens, place, found)
            tokens.skip_lines()
            tokens.take(",")
            tokens.skip_lines()
    else:
        # A date and a time may be two words.
        while not tokens.ended and tokens.next not in (",", "\n", "]", "}"):
            tokens.pop()


def _syntax(text: str, name: str, message: str) -> str:
    match = _SYNTAX_LINE.match(message)
    lines = text.splitlines() or [""]
    number = int(match["line"]) if match and match["line"] else len(lines)
    number = min(number, len(lines))
    line = lines[number - 1]
    field = line.partition("=")[0].strip() if "=" in line else line.strip()
    what = match["what"] if match else message
    return f"{name}:{number}: {field or 'end of the file'}: {what}; this is not TOML, write `name = value`"


def _converted(raw: Any, kind: type[Struct]) -> Struct:
    """Return the struct that a document describes. Raises _Wrong."""
    for place, value in _leaves(raw, ()):
        if isinstance(value, float) and not math.isfinite(value):
            raise _Wrong(place, f"{value} is not a number to reckon with, write a finite one")
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        raise _explained(str(error), raw, kind) from error


def _leaves(value: Any, place: Place) -> Iterator[tuple[Place, Any]]:
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _leaves(each, (*place, key))
    elif isinstance(value, list | tuple):
        for index, each in enumerate(value):
            yield from _leaves(each, (*place, index))
    else:
        yield place, value


def _explained(message: str, raw: Any, kind: type[Any]) -> _Wrong:
    match = _WHERE.match(message)
    assert match is not None, "the pattern takes any text"
    what = match["what"]
    place = _place(match["path"] or "", message, raw, kind)
    if missing := _MISSING.match(what):
        field = missing[1]
        return _Wrong((*place, field), f"is missing; it is {_allowed(kind, (*place, field))}")
    if unknown := _UNKNOWN.match(what):
        known = _fields(kind, place)
        near = difflib.get_close_matches(unknown[1], known, n=1)
        hint = f"did you mean {near[0]}? There are" if near else "there are"
        return _Wrong((*place, unknown[1]), f"there is no such field; {hint} {', '.join(known)}")
    value = _at(raw, place)
    if expected := _EXPECTED.match(what):
        return _Wrong(place, f"{_shown(value)} is not allowed, it must be {expected['allowed'].replace('`', '')}")
    if what.startswith("Invalid"):
        return _Wrong(place, f"{_shown(value)} is not allowed, it must be {_allowed(kind, place)}")
    # A ValueError of __post_init__: its place is the struct, and its words name the field.
    for word in re.findall(r"[A-Za-z_]\w*", what):
        if word in _fields(kind, place):
            text = re.sub(rf"^{word}\b:?\s*", "", what)
            return _Wrong((*place, word), text)
    return _Wrong(place, what)


def _place(path: str, message: str, raw: Any, kind: type[Any]) -> Place:
    """Return the place of msgspec's path, with the keys that it writes as [...]: sought by leaving out the others."""
    place: Place = ()
    for step in _STEP.finditer(path):
        if step["key"] is not None:
            place = (*place, step["key"])
        elif step["index"] is not None:
            place = (*place, int(step["index"]))
        else:
            table = _at(raw, place)
            for key in list(table)[:ENTRIES_MAX] if isinstance(table, dict) else []:
                try:
                    msgspec.convert(_replaced(raw, place, {key: table[key]}), kind)
                except msgspec.ValidationError as error:
                    if str(error) == message:
                        place = (*place, key)
                        break
            else:
                return place
    return place


def _replaced(raw: Any, place: Place, value: Any) -> Any:
    if not place:
        return value
    first, rest = place[0], place[1:]
    if isinstance(raw, dict):
        return {**raw, first: _replaced(raw[first], rest, value)}
    assert isinstance(first, int), "only lists have no keys"
    return [*raw[:first], _replaced(raw[first], rest, value), *raw[first + 1 :]]


def _at(raw: Any, place: Place) -> Any:
    for step in place:
        if isinstance(raw, dict):
            raw = raw.get(step)
        elif isinstance(raw, list | tuple) and isinstance(step, int) and step < len(raw):
            raw = raw[step]
        else:
            return None
    return raw


def _put(raw: Any, place: Place, value: Any, kind: type[Any], option: str) -> None:
    """Set the value at a place of a document, in it. Raises TableError where there is no such place."""
    for number, step in enumerate(place):
        last = number == len(place) - 1
        if isinstance(raw, list):
            if not isinstance(step, int) or step >= len(raw):
                raise TableError(f"{option}: {_written(place)}: there are elements 0 to {len(raw) - 1}, not {step}")
            if last:
                raw[step] = value
                return
            raw = raw[step]
        elif isinstance(raw, dict):
            key = str(step)
            if last:
                raw[key] = value
                return
            if raw.get(key) is None and key in _fields(kind, place[:number]):
                raw[key] = {}
            if key not in raw:
                known = _choice(list(raw))
                raise TableError(f"{option}: {_written(place[: number + 1])}: there is no such field; it is {known}")
            raw = raw[key]
        else:
            before = _written(place[:number])
            raise TableError(f"{option}: {_written(place)}: {before} is {_shown(raw)}, which has no fields")


def _types(kind: type[Any], place: Place) -> list[inspect.Type]:
    """Return the types that a place may have; several where it lies in a union."""
    found = _members(inspect.type_info(kind))
    for step in place:
        inner: list[inspect.Type] = []
        for each in found:
            if isinstance(each, inspect.StructType):
                inner += [field.type for field in each.fields if field.encode_name == step]
            elif isinstance(each, inspect.DictType):
                inner.append(each.value_type)
            elif isinstance(each, inspect.ListType | inspect.VarTupleType | inspect.SetType | inspect.FrozenSetType):
                inner.append(each.item_type)
            elif isinstance(each, inspect.TupleType) and isinstance(step, int) and step < len(each.item_types):
                inner.append(each.item_types[step])
        found = [member for each in inner for member in _members(each)]
    return found


def _members(kind: inspect.Type) -> list[inspect.Type]:
    while isinstance(kind, inspect.Metadata):
        kind = kind.type
    return (
        [member for each in kind.types for member in _members(each)] if isinstance(kind, inspect.UnionType) else [kind]
    )


def _fields(kind: type[Any], place: Place) -> list[str]:
    return [
        field.encode_name
        for each in _types(kind, place)
        if isinstance(each, inspect.StructType)
        for field in each.fields
    ]


def _is_whole(kind: type[Any], place: Place) -> bool:
    types = _types(kind, place)
    return any(isinstance(each, inspect.IntType) for each in types) and not any(
        isinstance(each, inspect.FloatType) for each in types
    )


def _allowed(kind: type[Any], place: Place) -> str:
    words = []
    for each in _types(kind, place):
        if isinstance(each, inspect.LiteralType):
            words += [repr(value) for value in each.values]
        elif isinstance(each, inspect.EnumType):
            words += [repr(member.value) for member in each.cls]
        elif isinstance(each, inspect.StructType):
            words.append(f"a table of {', '.join(field.encode_name for field in each.fields)}")
        else:
            words.append(f"of type {type(each).__name__.removesuffix('Type').lower()}")
    return " or ".join(words) or "not known here"


def _choice(names: list[str]) -> str:
    return ", ".join(names) if names else "not there: nothing can be set"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list | tuple):
        return f"an array of {len(value)}"
    return repr(value)


def _written(place: Place) -> str:
    """Return a place as people write it: stages[0].rate."""
    text = ""
    for step in place:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else str(step)
    return text

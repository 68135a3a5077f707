"""A strict reader of EDN, the notation of Jepsen's histories: values, or an error that names line and column.

nil, booleans, numbers and strings become Python's own; vectors and lists become tuples, sets frozensets, maps dicts.
Keywords, symbols and tagged values have types of their own. Anything else is refused, also a map with a key twice.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

MAX_DEPTH: Final = 100
"""Collections inside collections; more is a damaged file, not a history."""

Value = Any
"""None, bool, int, float, str, Keyword, Symbol, Tagged, tuple, frozenset or dict."""


class EdnError(Exception):
    """The text is not EDN; the message says what is wrong, and where as `line 3, column 7`."""

    def __init__(self, what: str, line: int, column: int) -> None:
        """Say `what` is wrong at a line and a column, both counted from 1."""
        super().__init__(f"line {line}, column {column}: {what}")
        self.line = line
        self.column = column


class Keyword(str):
    """A keyword; its text is without the colon, so `Keyword("ok") == "ok"`."""

    __slots__ = ()

    def __repr__(self) -> str:
        """Return it as EDN writes it."""
        return f":{self}"


class Symbol(str):
    """A symbol."""

    __slots__ = ()


@dataclass(frozen=True)
class Tagged:
    """A value under a tag, as `#inst "…"`."""

    tag: str
    value: Value


_BLANK: Final = re.compile(r"(?:[\s,]+|;[^\n]*)*")
_TOKEN: Final = re.compile(
    r"""(?P<string>"(?:[^"\\]|\\.)*")
    |(?P<open>\#\{|[(\[{])
    |(?P<close>[)\]}])
    |(?P<discard>\#_)
    |(?P<tag>\#[A-Za-z][\w.*+!?$%&=<>/-]*)
    |(?P<char>\\(?:newline|return|space|tab|formfeed|backspace|u[0-9A-Fa-f]{4}|\S))
    |(?P<atom>[^\s,;"()\[\]{}\\\#][^\s,;"()\[\]{}\\]*)""",
    re.VERBOSE | re.DOTALL,
)
_INTEGER: Final = re.compile(r"[+-]?(?:0|[1-9][0-9]*)N?")
_FLOAT: Final = re.compile(r"[+-]?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?M?")
_NAME: Final = r"(?:[A-Za-z*!_?$%&=<>|][\w.*+!?$%&=<>:#'|-]*|[-+.](?:[A-Za-z*+!_?$%&=<>|.-][\w.*+!?$%&=<>:#'|-]*)?)"
_SYMBOL: Final = re.compile(rf"(?:{_NAME}/)?{_NAME}|/")
_KEYWORD: Final = re.compile(r":(?:[\w.*+!?$%&=<>#'|-]+/)?[\w.*+!?$%&=<>#'|:-]+")
_ESCAPE: Final = re.compile(r"\\(u[0-9A-Fa-f]{4}|.)", re.DOTALL)
_ESCAPES: Final = {"t": "\t", "r": "\r", "n": "\n", "b": "\b", "f": "\f", "\\": "\\", '"': '"'}
_CHARACTERS: Final = {
    "newline": "\n",
    "return": "\r",
    "space": " ",
    "tab": "\t",
    "formfeed": "\f",
    "backspace": "\b",
}
_CLOSES: Final = {"(": ")", "[": "]", "{": "}", "#{": "}"}
_WORDS: Final[dict[str, Value]] = {"nil": None, "true": True, "false": False}


def read_all(text: str, show: Callable[[int], None] | None = None) -> Iterator[tuple[int, Value]]:
    """Yield the line and the value of each form, whether they follow each other or stand in a vector around all.

    `show` is told after each form how many characters were read. Raises EdnError at the first place that is not EDN.
    """
    reader = _Reader(text)
    line, counted = 1, 0
    opened: int | None = None
    while (start := reader.skip()) < len(text):
        if text[start] == "[" and opened is None:
            opened, reader.at = start, start + 1
            continue
        if text[start] == "]" and opened is not None:
            opened, reader.at = None, start + 1
            continue
        line, counted = line + text.count("\n", counted, start), start
        found, value = reader.form(0)
        if found:
            yield line, value
        if show is not None:
            show(reader.at)
    if opened is not None:
        raise reader.error("[ is never closed", opened)


_ABSENT: Final = (False, None)
"""What a discarded form gives: no value."""


class _Reader:
    """A position in a text, and the forms from there on."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def skip(self) -> int:
        """Move over blanks, commas and comments and return where that ends."""
        match = _BLANK.match(self.text, self.at)
        self.at = match.end() if match else self.at
        return self.at

    def error(self, what: str, at: int) -> EdnError:
        """Return an error at an offset."""
        before = self.text.rfind("\n", 0, at) + 1
        return EdnError(what, self.text.count("\n", 0, at) + 1, at - before + 1)

    def form(self, depth: int) -> tuple[bool, Value]:
        """Read one form; the first of the pair says whether it was a value and not a discarded one."""
        if depth > MAX_DEPTH:
            raise self.error(f"more than {MAX_DEPTH} collections inside each other", self.at)
        at = self.skip()
        token = _TOKEN.match(self.text, at)
        if token is None:
            raise self.error(self._unreadable(at), at)
        self.at = token.end()
        text = token.group()
        match token.lastgroup:
            case "atom":
                return True, self._atom(text, at)
            case "string":
                return True, self._string(text, at)
            case "open":
                return True, self._collection(text, at, depth)
            case "char":
                name = text[1:]
                code = chr(int(name[1:], 16)) if len(name) == 5 and name[0] == "u" else name
                return True, _CHARACTERS.get(name, code)
            case "tag":
                return True, Tagged(text[1:], self._value(depth, f"the tag {text} stands before nothing", at))
            case "discard":
                self._value(depth, "#_ stands before nothing", at)
                return _ABSENT
        raise self.error(f"{text} closes nothing", at)

    def _unreadable(self, at: int) -> str:
        if at >= len(self.text):
            return "the text ends where a value should be"
        if self.text[at] == '"':
            return "a string begins here and never ends"
        return f"no value begins with {self.text[at : at + 2]!r}"

    def _value(self, depth: int, otherwise: str, at: int) -> Value:
        """Read the next form that is not discarded."""
        found = False
        value = None
        while not found:
            if self.skip() >= len(self.text) or self.text[self.at] in ")]}":
                raise self.error(otherwise, at)
            found, value = self.form(depth + 1)
        return value

    def _collection(self, opened: str, at: int, depth: int) -> Value:
        items: list[Value] = []
        while True:
            here = self.skip()
            if here >= len(self.text):
                raise self.error(f"{opened} is never closed", at)
            if self.text[here] in ")]}":
                if self.text[here] != _CLOSES[opened]:
                    raise self.error(f"{self.text[here]} cannot close the {opened} before it", here)
                self.at = here + 1
                break
            found, value = self.form(depth + 1)
            if found:
                items.append(value)
        if opened in ("[", "("):
            return tuple(items)
        try:
            return frozenset(items) if opened == "#{" and self._differ(items, at) else self._map(items, at)
        except TypeError as error:
            raise self.error("a map cannot be a key or a member of a set here", at) from error

    def _differ(self, items: list[Value], at: int) -> bool:
        if len(set(items)) != len(items):
            raise self.error("the set has a member twice", at)
        return True

    def _map(self, items: list[Value], at: int) -> dict[Value, Value]:
        if len(items) % 2:
            raise self.error("the map has a key without a value", at)
        keys = items[::2]
        if len(set(keys)) != len(keys):
            raise self.error("the map has a key twice", at)
        return dict(zip(keys, items[1::2], strict=True))

    def _atom(self, text: str, at: int) -> Value:
        if text in _WORDS:
            return _WORDS[text]
        if _INTEGER.fullmatch(text):
            return int(text.removesuffix("N"))
        if text[0] == ":" and _KEYWORD.fullmatch(text):
            return Keyword(text[1:])
        if _FLOAT.fullmatch(text):
            return float(text.removesuffix("M"))
        if _SYMBOL.fullmatch(text):
            return Symbol(text)
        raise self.error(f"{text} is no number, keyword or symbol", at)

    def _string(self, text: str, at: int) -> str:
        def plain(match: re.Match[str]) -> str:
            name = match.group(1)
            if len(name) == 5:
                return chr(int(name[1:], 16))
            if name not in _ESCAPES:
                raise self.error(f"a string cannot hold \\{name}", at + 1 + match.start())
            return _ESCAPES[name]

        return _ESCAPE.sub(plain, text[1:-1]) if "\\" in text else text[1:-1]

"""The EDN reader: every value it writes down it reads again, and what is no EDN is refused at its place."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from invariants.foreign.edn import MAX_DEPTH, EdnError, Keyword, Symbol, Tagged, read_all

NAMES = st.from_regex(r"[a-z][a-z0-9*!?-]{0,5}", fullmatch=True).filter(lambda n: n not in ("nil", "true", "false"))
ATOMS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8"), max_size=8)
    | NAMES.map(Keyword)
    | NAMES.map(Symbol)
)


def hashable(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3)


KEYS = st.recursive(ATOMS, hashable, max_leaves=5)
VALUES = st.recursive(
    KEYS,
    lambda inner: (
        st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=3)
        | st.builds(Tagged, NAMES, inner)
    ),
    max_leaves=12,
)


def written(value: Any) -> str:
    if value is None:
        return "nil"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Keyword):
        return f":{value}"
    if isinstance(value, Symbol):
        return str(value)
    if isinstance(value, str):
        escapes = {"\\": "\\\\", '"': '\\"', "\n": "\\n"}
        return '"' + "".join(escapes.get(letter, letter) for letter in value) + '"'
    if isinstance(value, Tagged):
        return f"#{value.tag} {written(value.value)}"
    if isinstance(value, tuple):
        return "(" + " ".join(map(written, value)) + ")"
    if isinstance(value, frozenset):
        return "#{" + ",".join(map(written, value)) + "}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{written(k)} {written(v)}" for k, v in value.items()) + "}"
    return repr(value)


@given(VALUES)
def test_what_is_written_is_read_again(value: Any) -> None:
    ((_, again),) = read_all(f"; first\n#_ ignored {written(value)} ; last")
    assert again == value
    assert type(again) is type(value)


def test_forms_know_their_lines_also_inside_one_vector() -> None:
    text = "; comment\n{:a 1}\n\n[1 2]"
    assert list(read_all(text)) == [(2, {"a": 1}), (4, 1), (4, 2)]
    assert list(read_all("[{:a 1}\n #_ {:b 2}\n {:c 3}]\n:d")) == [(1, {"a": 1}), (3, {"c": 3}), (4, "d")]


def test_the_other_atoms() -> None:
    text = r'\a \newline A "\n\"" 7N -0.5 1e3 2.50M foo/bar :a/b #inst "2020" / + -'
    found = [value for _, value in read_all(text)]
    assert found == [
        *("a", "\n", "A", '\n"', 7, -0.5, 1000.0, 2.5, "foo/bar", "a/b", Tagged("inst", "2020"), "/", "+", "-"),
    ]


@pytest.mark.parametrize(
    ("text", "line", "column", "said"),
    [
        ("{:a 1", 1, 1, "{ is never closed"),
        ("[1 2", 1, 1, "[ is never closed"),
        ("{:a\n [1 }}", 2, 5, "} cannot close the [ before it"),
        ("1 )", 1, 3, ") closes nothing"),
        ("{:a 1 :b}", 1, 1, "a key without a value"),
        ("{:a 1, :a 2}", 1, 1, "the map has a key twice"),
        ("#{1 1}", 1, 1, "the set has a member twice"),
        ("{{} 1}", 1, 1, "a map cannot be a key"),
        ("\n  012", 2, 3, "012 is no number"),
        ('"\\q"', 1, 2, "a string cannot hold \\q"),
        ("{:a #_}", 1, 5, "#_ stands before nothing"),
        ("{:a #inst}", 1, 5, "the tag #inst stands before nothing"),
        ("(" * (MAX_DEPTH + 3), 1, MAX_DEPTH + 2, "collections inside each other"),
        ("# 1", 1, 1, "no value begins with '# '"),
    ],
)
def test_what_is_no_edn_is_refused_at_its_place(text: str, line: int, column: int, said: str) -> None:
    with pytest.raises(EdnError, match=f"^line {line}, column {column}: ") as caught:
        list(read_all(text))
    assert said in str(caught.value)
    assert (caught.value.line, caught.value.column) == (line, column)

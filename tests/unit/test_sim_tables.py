"""Parameter files are refused with the file, the line and the field, whatever is wrong with them."""

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.tables import Place, TableError, lines_of, override, parse_toml, read_toml

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Stage(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    name: str
    rate_per_s: float
    share: Share = 0.5

    def __post_init__(self) -> None:
        if self.rate_per_s <= 0:
            raise ValueError(f"rate_per_s must be above 0, not {self.rate_per_s:g}")


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    users: int
    kind: Literal["steady", "burst"] = "steady"
    zones: int | None = None
    limits: dict[str, Stage] = {}
    stages: list[Stage] = []
    first: Stage | None = None
    span: tuple[float, float] = (1.0, 2.0)

    def __post_init__(self) -> None:
        if self.users < 1:
            raise ValueError("users: must be at least 1")


FULL = '''users = 10  # "kind = 3"
kind = "burst"
span = [
    1.5,
    2.5,  # "span = 9"
]
first = { name = "a", rate_per_s = 2.0, share = 0.25 }

[limits.before]
name = """
users = "two"
lines"""
rate_per_s = 3.0

[limits]
after.name = "b"
after.rate_per_s = 4.0
"quoted key" = { name = 'c', rate_per_s = 5.0 }

[[stages]]
name = "first"
rate_per_s = 6.0

[[stages]]
name = "second"
rate_per_s = 7.0
share = 1.0
'''

PLACES: dict[Place, int] = {
    ("users",): 1,
    ("kind",): 2,
    ("span",): 3,
    ("span", 0): 4,
    ("span", 1): 5,
    ("first", "rate_per_s"): 7,
    ("limits", "before"): 9,
    ("limits", "before", "name"): 10,
    ("limits", "before", "rate_per_s"): 13,
    ("limits", "after", "name"): 16,
    ("limits", "after", "rate_per_s"): 17,
    ("limits", "quoted key", "rate_per_s"): 18,
    ("stages", 0): 20,
    ("stages", 0, "rate_per_s"): 22,
    ("stages", 1, "name"): 25,
    ("stages", 1, "share"): 27,
}


def refused(text: str) -> str:
    with pytest.raises(TableError) as caught:
        parse_toml(text, Plan, "plan.toml")
    return str(caught.value)


def test_every_form_of_a_key_is_found_at_its_line() -> None:
    found = lines_of(FULL)
    assert {place: found[place] for place in PLACES} == PLACES


def test_a_good_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(FULL)
    plan = read_toml(path, Plan)
    assert plan.users == 10
    assert plan.limits["quoted key"].rate_per_s == 5.0
    assert plan.limits["before"].name == 'users = "two"\nlines'
    assert [stage.name for stage in plan.stages] == ["first", "second"]


@pytest.mark.parametrize(
    ("old", "new", "start", "words"),
    [
        ("users = 10", 'users = "ten"', "plan.toml:1: users: 'ten' is not allowed, it must be int", ""),
        ("users = 10", "users = 0", "plan.toml:1: users: must be at least 1", ""),
        ("users = 10", "users = nan", "plan.toml:1: users: nan", "finite"),
        ("users = 10", "usres = 10", "plan.toml:1: usres: there is no such field", "did you mean users"),
        ("users = 10", "# users = 10", "plan.toml:1: users: is missing", "int"),
        ("users = 10", "users = ", "plan.toml:1: users: ", "not TOML"),
        ('"burst"', '"bursty"', "plan.toml:2: kind: 'bursty' is not allowed", "'burst' or 'steady'"),
        ("    2.5,", '    "x",', "plan.toml:5: span[1]: 'x' is not allowed", "float"),
        ("    2.5,", "", "plan.toml:3: span: an array of 1 is not allowed", "length 2"),
        ("rate_per_s = 2.0", "rate_per_s = -2", "plan.toml:7: first.rate_per_s: must be above 0, not -2", ""),
        ("share = 0.25", "share = 1.25", "plan.toml:7: first.share: 1.25 is not allowed", "<= 1"),
        ("rate_per_s = 3.0", "", "plan.toml:9: limits.before.rate_per_s: is missing", "float"),
        ("rate_per_s = 3.0", "rate_per_s = 0", "plan.toml:13: limits.before.rate_per_s: must be above 0", ""),
        ("after.rate_per_s = 4.0", "after.rate_per_s = []", "plan.toml:17: limits.after.rate_per_s: an array", ""),
        ("rate_per_s = 5.0 }", "rate_per_s = true }", "plan.toml:18: limits.quoted key.rate_per_s: true", "float"),
        ('name = "first"', "", "plan.toml:20: stages[0].name: is missing", "str"),
        ("share = 1.0", "shore = 1.0", "plan.toml:27: stages[1].shore: there is no such field", "name, rate_per_s"),
        ("share = 1.0", "share = 1.0\nshare = 2.0", "plan.toml:28: share: ", "not TOML"),
        ("rate_per_s = 6.0", "rate_per_s = @", "plan.toml:22: rate_per_s: Invalid value", "not TOML"),
        ('[[stages]]\nname = "second"', '[stages]\nname = "second"', "plan.toml:24: [stages]", "not TOML"),
    ],
)
def test_a_bad_file_names_line_and_field(old: str, new: str, start: str, words: str) -> None:
    assert FULL.count(old) >= 1
    message = refused(FULL.replace(old, new, 1))
    assert message.startswith(start)
    assert words in message


def test_files_that_are_no_text_or_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r"absent\.toml: cannot be read: No such file"):
        read_toml(tmp_path / "absent.toml", Plan)
    (tmp_path / "binary.toml").write_bytes(b"users = 1\nkind = '\xff'\n")
    with pytest.raises(TableError, match=r"binary\.toml:2: .*UTF-8"):
        read_toml(tmp_path / "binary.toml", Plan)
    with pytest.raises(TableError, match=r"plan\.toml:1: .*nested too deeply"):
        parse_toml("users = " + "[" * 5000 + "]" * 5000, Plan, "plan.toml")


def test_a_file_that_ends_too_early_is_refused_at_its_end() -> None:
    assert refused('users = 1\nkind = "steady"\nspan = [1,').startswith("plan.toml:3: span: ")
    assert refused("").startswith("plan.toml:1: users: is missing")


# A document of random tables: every leaf is a number that is written on a line of its own, or in an inline table.
WORDS = st.text("abcdef_ .\"'#=[]{}", min_size=1, max_size=6)


class Leaf(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    size: Annotated[int, msgspec.Meta(ge=0, le=99)]
    share: Share


class Shelf(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    named: dict[str, Leaf] = {}
    listed: list[Leaf] = []
    inline: list[Leaf] = []


def quoted(word: str) -> str:
    return msgspec.json.encode(word).decode()


@st.composite
def shelves(draw: st.DrawFn) -> tuple[list[str], dict[Place, int]]:
    """Return the lines of a document and the line of each of its leaves."""
    lines: list[str] = []
    places: dict[Place, int] = {}

    def put(text: str, *at: Place) -> None:
        for _ in range(draw(st.integers(0, 2))):
            lines.append(draw(st.sampled_from(["", "# size = 3", "  # [[listed]]"])))
        lines.append(text)
        for place in at:
            places[place] = len(lines)

    size, share = st.integers(0, 99), st.floats(0, 1, allow_nan=False).map(repr)
    count = draw(st.integers(0, 3))
    put("inline = [")
    for index in range(count):
        put(
            f"  {{ size = {draw(size)}, share = {draw(share)} }},",
            ("inline", index, "size"),
            ("inline", index, "share"),
        )
    put("]")
    for word in draw(st.lists(WORDS, max_size=3, unique=True)):
        if draw(st.booleans()):
            put(f"[named.{quoted(word)}]")
            put(f"size = {draw(size)}", ("named", word, "size"))
            put(f"'share' = {draw(share)}  # share = 7", ("named", word, "share"))
        else:
            put(f"[ named . {quoted(word)} ]")
            put(f"share={draw(share)}", ("named", word, "share"))
            put(f"size={draw(size)}", ("named", word, "size"))
    for index in range(draw(st.integers(0, 3))):
        put("[[listed]]")
        put(f"size = {draw(size)}", ("listed", index, "size"))
        put(f"share = {draw(share)}", ("listed", index, "share"))
    return lines, places


@given(shelves(), st.data())
def test_any_single_corrupted_field_is_named_at_its_line(
    shelf: tuple[list[str], dict[Place, int]], data: st.DataObject
) -> None:
    lines, places = shelf
    parse_toml("\n".join(lines), Shelf, "f")
    if not places:
        return
    place = data.draw(st.sampled_from(sorted(places, key=str)))
    number = places[place]
    old = lines[number - 1]
    field = str(place[-1])
    at = old.index("=", old.index(field)) + 1
    end = min([each for each in (old.find(mark, at) for mark in (",", " }", "  #")) if each > 0], default=len(old))
    wrong: Any = data.draw(st.sampled_from(['"x"', "true", "-1", "100", "[1]", "{ a = 1 }", "nan", "1979-05-27"]))
    lines[number - 1] = f"{old[:at]} {wrong}{old[end:]}"
    with pytest.raises(TableError) as caught:
        parse_toml("\n".join(lines), Shelf, "f")
    written = str(place[0]) + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place[1:])
    assert str(caught.value).startswith(f"f:{number}: {written}: ")


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused_with_a_line(text: str) -> None:
    try:
        parse_toml(text, Shelf, "f")
    except TableError as error:
        assert str(error).startswith("f:")
        int(str(error).split(":")[1])
    else:
        assert tomllib.loads(text) is not None


BASE = Plan(users=5, limits={"day": Stage(name="d", rate_per_s=1.0)}, stages=[Stage(name="s", rate_per_s=2.0)])


@pytest.mark.parametrize(
    ("assignment", "read"),
    [
        ("users=1e6", lambda plan: plan.users == 1_000_000),
        ("users = 1_000", lambda plan: plan.users == 1000),
        ("kind=burst", lambda plan: plan.kind == "burst"),
        ('kind="burst"', lambda plan: plan.kind == "burst"),
        ("limits.day.rate_per_s=2.5", lambda plan: plan.limits["day"].rate_per_s == 2.5),
        ("stages.0.share=1", lambda plan: plan.stages[0].share == 1.0),
        ("span=[3, 4]", lambda plan: plan.span == (3.0, 4.0)),
    ],
)
def test_an_option_changes_one_field_and_leaves_the_rest(assignment: str, read: Any) -> None:
    changed = override(BASE, assignment)
    assert read(changed)
    assert not read(BASE)
    assert sum(getattr(changed, name) != getattr(BASE, name) for name in Plan.__struct_fields__) == 1


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("users", "--set users: write NAME=VALUE, where NAME is users, kind"),
        ("users=x", "--set users=x: users: 'x' is not allowed, it must be int"),
        ("users=1.5", "--set users=1.5: users: 1.5 is not allowed, it must be int"),
        ("users=0", "--set users=0: users: must be at least 1"),
        ("usres=3", "--set usres=3: usres: there is no such field; did you mean users"),
        ("kind=none", "--set kind=none: kind: 'none' is not allowed, it must be 'burst' or 'steady'"),
        ("limits.night.share=1", "limits.night: there is no such field; it is day"),
        ("limits.day.rate_per_s=0", "limits.day.rate_per_s: must be above 0, not 0"),
        ("limits.day.share=7", "limits.day.share: 7 is not allowed, it must be float <= 1"),
        ("stages.4.share=1", "there are elements 0 to 0, not 4"),
        ("users.a=1", "users is 5, which has no fields"),
        ("users=inf", "users: inf"),
    ],
)
def test_a_bad_option_names_itself_and_the_field(assignment: str, words: str) -> None:
    with pytest.raises(TableError) as caught:
        override(BASE, assignment)
    assert str(caught.value).startswith(f"--set {assignment}: ")
    assert words in str(caught.value)

"""The page of a comparison: the verdict first, every ratio with its interval, and the curves of both runs."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ledgerproof.cli import cli
from ledgerproof.loading import compare
from load.result import Result
from reports.compare_page import build_comparison, render_comparison
from tests.load_files import Part, made_load, write_load_run
from tests.unit.test_report_page import read

PARTS = (Part("steady", 12, 150, 1.0, (("bet", 0.7), ("balance", 0.3))),)


def plain(page: Path) -> str:
    return " ".join(" ".join(read(page).text).replace("\u202f", "").split())


def page_of(folder: Path, a: Result, b: Result, **changed: Any) -> Path:
    places = (write_load_run(folder / "a", a), write_load_run(folder / "b", b))
    found = compare.compare(a, b, ("a", "b"))
    return render_comparison(compare.told(found) | changed, places, compare.NOTICED, folder / "page.html")


@pytest.fixture(scope="module")
def slower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return page_of(tmp_path_factory.mktemp("slower"), made_load(PARTS), made_load(PARTS, seed=6, slower=1.6))


def test_slower_load_is_worse_with_ratio_and_interval(slower: Path) -> None:
    text = plain(slower)
    assert text.index("B IS WORSE") < text.index("Worse in B") < text.index("How to read it")
    assert re.search(r"Bets p50 worse 1\.[3-9]\d? 1\.\d+ to [12]\.?\d* ", text)
    html = slower.read_text()
    assert 'id="fig-ratios-0"' in html
    assert 'id="fig-curves-0"' in html
    assert "to be kept in mind" in text.lower()


def test_page_loads_nothing_and_has_every_id_once(slower: Path) -> None:
    reader = read(slower)
    assert all(link.startswith("#") or link == "data:," for link in reader.links)
    assert not {"script", "img", "iframe", "object"} & set(reader.tags)
    assert len(reader.ids) == len(set(reader.ids))
    assert {link[1:] for link in reader.links if link.startswith("#")} <= set(reader.ids)


def test_verdict_stands_beside_every_dot_in_words(slower: Path) -> None:
    drawn = re.findall(r">(worse|better|no difference|not decided)</text>", slower.read_text())
    # Once in the wide drawing and once in the narrow one.
    assert len(drawn) >= 4
    assert drawn[: len(drawn) // 2] == drawn[len(drawn) // 2 :]


def test_same_load_is_no_difference(tmp_path: Path) -> None:
    text = plain(page_of(tmp_path, made_load(PARTS), made_load(PARTS)))
    assert "NO DIFFERENCE" in text
    assert "Worse 0 of" in text


def test_faster_load_is_better(tmp_path: Path) -> None:
    assert "B IS BETTER" in plain(page_of(tmp_path, made_load(PARTS), made_load(PARTS, slower=0.5)))


def test_load_that_proves_nothing_is_said_first(tmp_path: Path) -> None:
    text = plain(page_of(tmp_path, made_load(PARTS), made_load(PARTS, lag_ms=5)))
    assert text.index("NOTHING PROVEN") < text.index("Why nothing is proven") < text.index("it measured itself")
    assert "A 2026-01-01 00:00:00 5" in text
    assert "B 2026-01-01 00:00:00 5" in text


def test_measures_without_a_ratio_say_why(tmp_path: Path) -> None:
    few = (Part("steady", 2, 20, 1.0, (("bet", 1),)),)
    text = plain(page_of(tmp_path, made_load(few), made_load(few, seed=6)))
    assert "Measures of steady that cannot be compared, and why" in text
    assert "too few samples for p99" in text


def test_loads_without_answers_give_a_page(tmp_path: Path) -> None:
    mute = made_load(PARTS, lost=lambda _: True)
    text = plain(page_of(tmp_path, mute, mute))
    assert "There are no answers in this phase to draw curves of." in text
    assert "No measure of this phase has a ratio with an interval." in text


def test_file_that_is_gone_is_a_gap(tmp_path: Path) -> None:
    a = made_load(PARTS)
    found = compare.compare(a, a, ("a", "b"))
    place = write_load_run(tmp_path / "a", a)
    page = render_comparison(compare.told(found), (place, tmp_path / "gone.json"), 0.03, tmp_path / "page.html")
    assert "B: gone.json : missing" in plain(page)


@pytest.mark.parametrize(
    ("ratio", "low", "high"),
    [(50.0, 20.0, 90.0), (0.001, 0.0005, 0.002), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (None, 1.0, 2.0)],
)
def test_odd_ratio_gives_a_page(tmp_path: Path, ratio: float | None, low: float, high: float) -> None:
    line = {"phase": "<p>", "op": "$x$", "measure": "p50", "a": 1.0, "b": 2.0, "unit": "ms", "said": "worse"}
    told = {"a": "a", "b": "b", "profile": "p", "said": "worse"}
    told["lines"] = [line | {"ratio": ratio, "low": low, "high": high}]  # type: ignore[assignment]
    page = render_comparison(told, (tmp_path, tmp_path), 0.03, tmp_path / "page.html")
    assert "B IS WORSE" in plain(page)


def test_comparison_without_lines_claims_nothing(tmp_path: Path) -> None:
    found = compare.compare(made_load([]), made_load([]), ("a", "b"))
    page = build_comparison(compare_page_form(found), (tmp_path, tmp_path), 0.03)
    assert page.title == "NOTHING PROVEN"
    assert page.parts == []


def compare_page_form(found: compare.Comparison) -> Any:
    import msgspec

    from reports.compare_page import Comparison

    return msgspec.convert(compare.told(found), Comparison)


def test_command_writes_page_and_json_and_keeps_its_exit_code(tmp_path: Path) -> None:
    a = write_load_run(tmp_path / "a", made_load(PARTS))
    b = write_load_run(tmp_path / "b", made_load(PARTS, seed=6, slower=1.6))
    page, data = tmp_path / "c.html", tmp_path / "c.json"
    done = CliRunner().invoke(
        cli, ["load", "compare", str(a), str(b), "--html", str(page), "--json", str(data)], standalone_mode=False
    )
    assert done.return_value == 10, done.output
    assert f"page: {page}" in done.output
    assert "B IS WORSE" in plain(page)
    assert json.loads(data.read_text())["said"] == "worse"


def test_page_that_cannot_be_written_is_told_before_anything_is_read(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["load", "compare", "x", "y", "--html", str(tmp_path / "no" / "c.html")])
    assert "cannot write" in str(done.exception)

"""The page of a run: complete in itself, honest about what is missing, and the same each time."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import polars as pl
import pytest

from invariants.anomalies import CHECKS
from reports.folder import read_run
from reports.render import render
from reports.words import CODES
from tests.report_runs import CHECKED, KINDS, Kind, write_run

RATE_PER_S = 40
"""Enough attempts for every figure, few enough for a unit test."""
TITLES: dict[Kind, str] = {
    "pass": "PASS",
    "sla_missed": "SLA MISSED",
    "violated": "INVARIANT VIOLATED",
    "invalid": "INVALID",
    "aborted": "ABORTED",
    "residue": "RESIDUE",
}


class Reader(HTMLParser):
    """Collects the text, the ids and every attribute that could make a browser fetch something."""

    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._hidden += tag == "style"
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                self.links.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag == "style"

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.text.append(data)


def read(page: Path) -> Reader:
    reader = Reader()
    reader.feed(page.read_text(encoding="utf-8"))
    return reader


def text_of(page: Path) -> str:
    return " ".join(" ".join(read(page).text).split())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, Path]:
    folder = tmp_path_factory.mktemp("runs")
    written = {kind: write_run(folder, kind, rate_per_s=RATE_PER_S) for kind in KINDS}
    for kind in ("sla_missed", "residue"):
        # Their figures are those of the good run: not drawing them again saves a third of the time.
        shutil.rmtree(written[kind] / "history")
        (written[kind] / "series.parquet").unlink()
    return written


@pytest.fixture(scope="module")
def pages(runs: dict[Kind, Path]) -> dict[Kind, Path]:
    return {kind: render(run) for kind, run in runs.items()}


@pytest.fixture
def run(runs: dict[Kind, Path], tmp_path: Path) -> Path:
    """Return a copy of the good run that a test may damage."""
    return Path(shutil.copytree(runs["pass"], tmp_path / "run", ignore=shutil.ignore_patterns("report.html")))


def rewrite_history(run: Path, change: Callable[[pl.DataFrame], pl.DataFrame]) -> None:
    """Change every part of the history, its manifest with it."""
    history = run / "history"
    lines = []
    for path in sorted(history.glob("*.parquet")):
        part = change(pl.read_parquet(path))
        part.write_parquet(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        lines.append(json.dumps({"file": path.name, "rows": part.height, "sha256": digest}))
    lines.append(json.dumps({"closed": True, "parts": len(lines)}))
    (history / "manifest.jsonl").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("kind", KINDS)
def test_page_loads_nothing_from_anywhere(pages: dict[Kind, Path], kind: Kind) -> None:
    reader = read(pages[kind])
    assert all(link.startswith("#") or link == "data:," for link in reader.links)
    assert not {"script", "img", "iframe", "object", "embed", "audio", "video"} & set(reader.tags)
    assert not re.search(r"@import|url\((?!#)", pages[kind].read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_link_has_one_target(pages: dict[Kind, Path], kind: Kind) -> None:
    reader = read(pages[kind])
    assert len(reader.ids) == len(set(reader.ids))
    targets = {link[1:] for link in reader.links if link.startswith("#")}
    targets |= set(re.findall(r"url\(#([^)]+)\)", pages[kind].read_text(encoding="utf-8")))
    assert targets <= set(reader.ids)


@pytest.mark.parametrize("kind", KINDS)
def test_page_begins_with_the_verdict_and_says_how_to_repeat_it(pages: dict[Kind, Path], kind: Kind) -> None:
    text = text_of(pages[kind])
    assert text.index(TITLES[kind]) < text.index("What to do next") < text.index("Acknowledged bets")
    command = "ledgerproof prove --seed 20251123 --duration 60 --rate 1000 --servers 4 --faults standard"
    assert command in text


def test_page_stays_small(pages: dict[Kind, Path]) -> None:
    assert max(page.stat().st_size for page in pages.values()) < 1_000_000


def test_same_folder_gives_the_same_page(pages: dict[Kind, Path]) -> None:
    page = pages["violated"]
    first = page.read_bytes()
    assert render(page.parent).read_bytes() == first


def test_drawings_take_every_colour_from_the_style_sheet(pages: dict[Kind, Path]) -> None:
    html = pages["pass"].read_text(encoding="utf-8")
    drawings = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert len(drawings) > 16
    colours = set(re.findall(r"(?:fill|stroke|color):\s*([^;\"]+)", " ".join(drawings)))
    assert {colour for colour in colours if not colour.startswith("var(--")} <= {"none"}
    defined = set(re.findall(r"(--[\w-]+):", html))
    assert set(re.findall(r"var\((--[\w-]+)\)", html)) <= defined | {"--tone"}


def test_every_checked_code_is_listed_and_every_other_is_named_as_unchecked(pages: dict[Kind, Path]) -> None:
    text = text_of(pages["pass"])
    unchecked = text[text.index("Not checked in this run") :]
    assert "A06" in unchecked
    assert not any(code in unchecked[: unchecked.index(".")] for code in CHECKED)
    assert "18 rules checked" in text


def test_every_code_of_the_checker_has_its_words() -> None:
    assert set(CHECKS) <= set(CODES)


def test_witnesses_come_before_the_figures_and_are_escaped(pages: dict[Kind, Path]) -> None:
    html = pages["violated"].read_text(encoding="utf-8")
    assert html.index('id="witness-A01"') < html.index('id="throughput"')
    assert "k-7000-&lt;b&gt;" in html
    assert "<b>x" not in html
    assert "12 of 61 shown" in unescape(text_of(pages["violated"]))


def test_fault_without_measured_effect_is_called_so(pages: dict[Kind, Path]) -> None:
    text = text_of(pages["invalid"])
    assert "only 2 measured" in text
    assert "pause redis: no effect measured" in text


def test_secrets_of_the_configuration_are_not_shown(pages: dict[Kind, Path]) -> None:
    assert "not-to-be-shown" not in pages["pass"].read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", KINDS)
def test_every_table_has_a_caption_and_every_figure_words(pages: dict[Kind, Path], kind: Kind) -> None:
    html = pages[kind].read_text(encoding="utf-8")
    assert html.count("<table") == html.count("<caption>")
    for figure in re.findall(r"<figure[^>]*>", html):
        assert re.search(r'aria-label="[^"]{20,}"', figure)


@pytest.mark.parametrize(
    ("part", "consequence"),
    [
        ("verdict.json", "nothing says whether the ledger was right"),
        ("history", "there is no throughput, latency or availability over time"),
        ("timeline.parquet", "phases and faults on the figures come from verdict.json"),
        ("series.parquet", "there are no lag curves"),
        ("history/manifest.jsonl", "the history was never closed"),
        ("history/part-000001.parquet", "history part part-000001.parquet is missing"),
    ],
)
def test_missing_part_is_named(run: Path, part: str, consequence: str) -> None:
    path = run / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    gaps = [gap for gap in read_run(run).gaps if gap.part.rstrip("/") == part.split("/", 1)[0]]
    assert any(consequence in gap.consequence for gap in gaps)


@pytest.mark.parametrize(
    "part",
    ["verdict.json", "timeline.parquet", "series.parquet", "history/part-000001.parquet", "history/manifest.jsonl"],
)
@pytest.mark.parametrize("damage", ["cut", "empty", "other"])
def test_torn_part_is_named(run: Path, part: str, damage: str) -> None:
    path = run / part
    content = {"cut": path.read_bytes()[:150], "empty": b"", "other": b"\x00\xff not this\n"}[damage]
    path.write_bytes(content)
    assert part.split("/", 1)[0] in {gap.part.rstrip("/") for gap in read_run(run).gaps}


def test_folder_with_every_part_missing_or_torn_gives_a_page(run: Path) -> None:
    (run / "timeline.parquet").unlink()
    (run / "series.parquet").write_bytes(b"PAR1")
    (run / "history" / "part-000000.parquet").unlink()
    text = text_of(render(run))
    assert text.index("PASS") < text.index("What this report lacks") < text.index("timeline.parquet")


def test_damaged_part_of_the_history_does_not_take_the_others_with_it(run: Path) -> None:
    (run / "history" / "part-000001.parquet").write_bytes(b"PAR1")
    damaged = read_run(run)
    assert damaged.attempts is not None
    assert damaged.attempts.height > 1000
    assert any("part-000001.parquet is corrupt" in gap.consequence for gap in damaged.gaps)


def test_empty_folder_gives_a_page_without_verdict(tmp_path: Path) -> None:
    text = text_of(render(tmp_path))
    assert text.index("NO VERDICT") < text.index("What this report lacks")


def test_verdict_alone_gives_a_page(runs: dict[Kind, Path], tmp_path: Path) -> None:
    shutil.copy(runs["violated"] / "verdict.json", tmp_path)
    text = text_of(render(tmp_path))
    assert "A02 duplicate: 61" in text
    assert "The run has no history of attempts" in text


def test_killed_harness_still_says_how_to_repeat_the_run(run: Path) -> None:
    verdict = json.loads((run / "verdict.json").read_text())
    (run / "verdict.json").unlink()
    left = {name: verdict[name] for name in ("run", "seed", "commit", "config", "started_at")}
    (run / "harness.json").write_text(json.dumps(left))
    (run / "series.parquet").unlink()
    text = text_of(render(run))
    assert "NO VERDICT" in text
    assert "ledgerproof prove --seed 20251123" in text


def test_check_that_could_not_be_carried_out_is_named_with_its_cause(runs: dict[Kind, Path], tmp_path: Path) -> None:
    verdict = json.loads((runs["pass"] / "verdict.json").read_text())
    del verdict["anomalies"]["A12"]
    verdict["unchecked"] = {"A12": "no escrow column"}
    (tmp_path / "verdict.json").write_text(json.dumps(verdict))
    text = text_of(render(tmp_path))
    assert "A12 no escrow column" in text[text.index("could not be carried out") :]


def test_tables_without_rows_give_a_page(run: Path) -> None:
    for path in [run / "timeline.parquet", run / "series.parquet"]:
        pl.read_parquet(path).clear().write_parquet(path)
    rewrite_history(run, lambda part: part.clear())
    assert "holds no attempt" in text_of(render(run))


def test_history_of_unanswered_attempts_gives_a_page(run: Path) -> None:
    rewrite_history(run, lambda part: part.filter(pl.col("record") == "invoke"))
    text = text_of(render(run))
    assert "Unknown outcomes 2 400" in text.replace("\u202f", " ")


@pytest.mark.parametrize(
    "odd",
    [
        {"anomalies": [1, 2]},
        {"faults": [{"id": 1, "kind": "kill", "requested_at": "soon"}]},
        {"sla": "none"},
        {"machine": None, "timings": {"total_s": "long"}},
        {"started_at": "yesterday", "commit": "abc-dirty", "seed": "0x7"},
        {"verdict": "SOMETHING_NEW", "anomalies": {"Z99": 3}},
        {"config": {"servers": [1, 2], "deep": {"list": list(range(50)), "none": None, "on": True}}},
        {"unknown_field": {"a": 1}, "reasons": [f"reason {n}" for n in range(100)]},
        {"faults": [{"kind": "kill <i>", "target": "$pg_0$ & co", "measured_start": 20.0}]},
    ],
)
def test_odd_field_does_not_take_the_page_with_it(
    runs: dict[Kind, Path], tmp_path: Path, odd: dict[str, object]
) -> None:
    verdict = json.loads((runs["pass"] / "verdict.json").read_text())
    (tmp_path / "verdict.json").write_text(json.dumps(verdict | odd))
    assert "Acknowledged bets" in text_of(render(tmp_path))


def test_verdict_that_contradicts_itself_is_not_trusted(runs: dict[Kind, Path], tmp_path: Path) -> None:
    verdict = json.loads((runs["pass"] / "verdict.json").read_text())
    verdict["anomalies"]["A01"] = 2
    (tmp_path / "verdict.json").write_text(json.dumps(verdict))
    assert "says PASS, yet counts 2" in text_of(render(tmp_path)).replace("\u00a0", " ")


def test_place_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotADirectoryError, match="not a run folder"):
        render(tmp_path / "absent")


@pytest.fixture
def many(run: Path) -> Iterator[Path]:
    """Yield a run with more nodes, faults and seconds than the figures have room for."""
    series = pl.read_parquet(run / "series.parquet")
    more = [
        series.filter(pl.col("node") == "pg0").with_columns(node=pl.lit(f"pg{n}"), t=pl.col("t") * 60)
        for n in range(40)
    ]
    pl.concat([series, *more]).write_parquet(run / "series.parquet")
    path = run / "verdict.json"
    verdict = json.loads(path.read_text())
    verdict["faults"] = [
        {"id": n, "kind": "kill", "target": f"pg{n}", "requested_at": 5.0 + n, "measured_start": 5.5 + n}
        for n in range(130)
    ]
    path.write_text(json.dumps(verdict))
    yield run


def test_large_run_is_bounded_on_the_page(many: Path) -> None:
    page = render(many)
    text = text_of(page)
    assert page.stat().st_size < 3_000_000
    assert "largest of 35 others" in text
    assert "30 more in verdict.json" in text

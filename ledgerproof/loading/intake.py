"""Takes the records of the load's workers, which are processes of their own, into the one history of a run.

Each worker connects to a Unix socket and sends what `load.records` says. A stream that breaks off before its last
record is a gap in the history, and said. What the end of a run needs is noted on the way: how many bets were
acknowledged, and which commands have an unknown outcome.
"""

import contextlib
import socket
import tempfile
import threading
from pathlib import Path
from typing import Final, Self

import msgspec

from invariants.history import Recorder, RecordingError
from ledgerproof import workload
from ledgerproof.client import Identity, identity_of
from ledgerproof.workload import Command
from load.recording import Numbers, Stream, read_frame
from load.records import Complete, Hello, Invoke, Record
from reference.commands import Side

CLOSE_WITHIN_S: Final = 30.0
COME_WITHIN_S: Final = 5.0
"""A worker that has ended has connected long ago; one that never does is not waited for longer."""


class Intake:
    """Listens from `start` to `stop`, for one load after another; the numbers of attempts go on."""

    def __init__(self, recorder: Recorder) -> None:
        self.problems: list[str] = []
        self.acknowledged_bets = 0
        self.sent = 0
        self.unknown: dict[Identity, Command] = {}
        self.unknown_count = 0
        self.last_unknown_sent_s = 0.0
        """When the last request that stayed without an answer was sent, seconds of the run."""
        self.numbers = Numbers(recorder)
        self._recorder = recorder
        self._lock = threading.Lock()
        self._came = threading.Condition()
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._listener: socket.socket | None = None
        self._threads: list[threading.Thread] = []
        self._streams: list[_Noting] = []
        self._open: list[socket.socket] = []

    def start(self) -> str:
        """Listen; return the address. Raises OSError."""
        # A socket's path is short, so it is not below the run's folder, which may be anywhere.
        self._folder = tempfile.TemporaryDirectory(prefix="ledgerproof-load-")
        address = str(Path(self._folder.name) / "history.sock")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(address)
        listener.listen()
        self._listener = listener
        self._threads, self._streams, self._open = [], [], []
        accepting = threading.Thread(target=self._accept, args=(listener,), name="intake", daemon=True)
        accepting.start()
        return address

    def stop(self, workers: int) -> None:
        """Wait for the streams to end; `workers` of them must have come whole. Safe to repeat."""
        listener, self._listener = self._listener, None
        if listener is None:
            return
        with self._came:
            self._came.wait_for(lambda: len(self._streams) >= workers, COME_WITHIN_S)
        with contextlib.suppress(OSError):
            # Closing alone does not wake a thread that accepts.
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for thread in self._threads:
            thread.join(CLOSE_WITHIN_S)
        for connection in self._open:
            connection.close()
        whole = sum(stream.whole for stream in self._streams)
        if whole < workers:
            self.problems.append(f"{workers - whole} of {workers} workers did not send their records to the end")
        if self._folder is not None:
            self._folder.cleanup()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop, whatever has come."""
        self.stop(0)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return  # Closed by `stop`.
            stream = _Noting(self, self._recorder)
            thread = threading.Thread(
                target=self._receive, args=(connection, stream), name="intake-worker", daemon=True
            )
            with self._came:
                self._open.append(connection)
                self._threads.append(thread)
                self._streams.append(stream)
                thread.start()
                self._came.notify_all()

    def _receive(self, connection: socket.socket, stream: "_Noting") -> None:
        decode = msgspec.msgpack.Decoder(Record).decode
        decode_hello = msgspec.msgpack.Decoder(Hello).decode
        try:
            with connection.makefile("rb") as source:
                decode_hello(read_frame(source))
                while not stream.whole:
                    stream.take(decode(read_frame(source)))
        except (OSError, EOFError, RecordingError, msgspec.MsgspecError) as error:
            self.problems.append(f"the records of a worker broke off: {type(error).__name__}: {error}")
        finally:
            # What has no end has an unknown outcome, and may still be under way in the service.
            for begun in stream.left():
                self.note(begun, Complete("info", begun.attempt, begun.client, begun.t))

    def note(self, begun: Invoke, done: Complete) -> None:
        """Note what became of an attempt."""
        with self._lock:
            self.sent += 1
            if done.record == "ok":
                self.acknowledged_bets += begun.op == "bet" and not done.replayed
            elif done.record == "info":
                self.unknown_count += 1
                self.last_unknown_sent_s = max(self.last_unknown_sent_s, begun.t)
                command = command_of(begun)
                if command is not None:
                    self.unknown.setdefault(identity_of(command), command)


class _Noting(Stream):
    """A stream that tells the intake of every attempt that has ended."""

    def __init__(self, intake: Intake, recorder: Recorder) -> None:
        super().__init__(recorder, intake.numbers)
        self._intake = intake
        self._begun: dict[int, Invoke] = {}

    def left(self) -> list[Invoke]:
        """Return the attempts that have not ended."""
        return list(self._begun.values())

    def take(self, record: Record) -> None:
        """Take one record and note what it ends."""
        super().take(record)
        if isinstance(record, Invoke):
            self._begun[record.attempt] = record
        elif isinstance(record, Complete):
            self._intake.note(self._begun.pop(record.attempt), record)


def command_of(begun: Invoke) -> Command | None:
    """Return the command of an attempt, to be sent again under its key; None for a read. Raises RecordingError."""
    key, user, amount = begun.key, begun.user, begun.amount
    if key is None:
        return None
    try:
        if begun.op in {"deposit", "withdraw"}:
            assert user is not None
            assert amount is not None
            make = workload.deposit if begun.op == "deposit" else workload.withdraw
            return make(user, amount, key, begun.tag)
        if begun.op == "bet":
            assert user is not None
            assert amount is not None
            assert begun.odds is not None
            return workload.bet(
                user=user,
                match_id=str(begun.match_id),
                selection=str(begun.selection),
                side=Side(str(begun.side)),
                odds=begun.odds,
                stake_minor=amount,
                key=key,
                tag=begun.tag,
            )
        if begun.op == "cancel":
            assert user is not None
            return workload.cancel(user, str(begun.match_id), str(begun.bet_id), key)
    except (AssertionError, ValueError) as error:
        raise RecordingError(f"attempt {begun.attempt} of a worker says too little of its {begun.op}") from error
    # A command on a match is a compare-and-set: nobody needs to send it again to know what became of it.
    return None

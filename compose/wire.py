"""The smallest exchange with each kind of server that tells whether it lives, and whether it does its work.

Plain sockets without client libraries: a probe must be cheap, must not retry by itself, and must not hang
longer than it was told.
"""

import hashlib
import hmac
import http.client
import secrets
import socket
import struct
from base64 import b64decode, b64encode

HOST = "127.0.0.1"
_PROTOCOL_3 = 196608
_AUTH_OK, _AUTH_SASL, _AUTH_SASL_CONTINUE, _AUTH_SASL_FINAL = 0, 10, 11, 12
_MESSAGES_MAX = 100
"""Parameter and notice messages before the one that is waited for."""
_KAFKA_API_VERSIONS = 18
_KAFKA_METADATA = 3
_ANSWER_BYTES_MAX = 1 << 20


class NoAnswer(Exception):
    """The server is not reachable or did not answer as a server of its kind does.

    `definite` is True if the operating system said so (refused, reset, closed), False if it was silent.
    """

    def __init__(self, reason: str, *, definite: bool) -> None:
        super().__init__(reason)
        self.definite = definite


class Connection:
    """A TCP connection to a local server; every failure is a NoAnswer."""

    def __init__(self, port: int, timeout_s: float) -> None:
        try:
            self._socket = socket.create_connection((HOST, port), timeout=timeout_s)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            raise _no_answer(error) from error

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def send(self, data: bytes) -> None:
        """Send all of `data`."""
        try:
            self._socket.sendall(data)
        except OSError as error:
            raise _no_answer(error) from error

    def receive(self, count: int) -> bytes:
        """Return exactly `count` bytes."""
        data = b""
        while len(data) < count:
            data += self.receive_some(count - len(data))
        return data

    def receive_some(self, limit: int) -> bytes:
        """Return at least one and at most `limit` bytes."""
        try:
            chunk = self._socket.recv(limit)
        except OSError as error:
            raise _no_answer(error) from error
        if not chunk:
            raise NoAnswer("closed the connection", definite=True)
        return chunk


def postgres_login(connection: Connection, user: str, password: str) -> None:
    """Open a session on a new connection (SCRAM-SHA-256, RFC 5802, without channel binding)."""
    connection.send(_postgres_startup(user))
    nonce = secrets.token_hex(12)
    first = f"n=,r={nonce}"
    mechanism = b"SCRAM-SHA-256\0"
    begin = f"n,,{first}".encode()
    _expect(connection, _AUTH_SASL)
    _postgres_send(connection, b"p", mechanism + struct.pack("!i", len(begin)) + begin)
    challenge = _expect(connection, _AUTH_SASL_CONTINUE).decode()
    fields = dict(item.split("=", 1) for item in challenge.split(","))
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), b64decode(fields["s"]), int(fields["i"]))
    client_key = hmac.digest(salted, b"Client Key", "sha256")
    last = f"c=biws,r={fields['r']}"
    signed = hmac.digest(hashlib.sha256(client_key).digest(), f"{first},{challenge},{last}".encode(), "sha256")
    proof = b64encode(bytes(a ^ b for a, b in zip(client_key, signed, strict=True))).decode()
    _postgres_send(connection, b"p", f"{last},p={proof}".encode())
    _expect(connection, _AUTH_SASL_FINAL)
    _expect(connection, _AUTH_OK)
    for _message in range(_MESSAGES_MAX):
        if _postgres_receive(connection)[0] == b"Z":
            return
    raise NoAnswer("does not begin the session", definite=True)


def postgres_lives(connection: Connection) -> None:
    """Send Sync in an open session and read ReadyForQuery: no statement, no transaction, nothing logged."""
    _postgres_send(connection, b"S", b"")
    for _message in range(_MESSAGES_MAX):
        kind, _body = _postgres_receive(connection)
        if kind == b"Z":
            return
        if kind == b"E":
            break
    raise NoAnswer("ended the session", definite=True)


def postgres_is_ready(port: int, timeout_s: float) -> None:
    """Begin a session: a server that takes connections asks for the password."""
    with Connection(port, timeout_s) as connection:
        connection.send(_postgres_startup("postgres"))
        # Read to its end: closing with something unread is a reset, which the server would log.
        kind, _body = _postgres_receive(connection)
    if kind != b"R":
        raise NoAnswer("does not take connections yet", definite=True)


def redis_lives(connection: Connection) -> None:
    """PING; a server that wants a password first is alive too."""
    connection.send(b"*1\r\n$4\r\nPING\r\n")
    answer = connection.receive_some(256)
    if not answer.startswith((b"+PONG", b"-NOAUTH")):
        raise NoAnswer(f"answered {answer[:40]!r}", definite=True)


def redis_is_ready(port: int, password: str, timeout_s: float) -> None:
    """Log in and PING."""
    secret = password.encode()
    with Connection(port, timeout_s) as connection:
        connection.send(b"*2\r\n$4\r\nAUTH\r\n$%d\r\n%s\r\n*1\r\n$4\r\nPING\r\n" % (len(secret), secret))
        answer = connection.receive(len(b"+OK\r\n+PONG\r\n"))
    if answer != b"+OK\r\n+PONG\r\n":
        raise NoAnswer(f"answered {answer[:40]!r}", definite=True)


def kafka_lives(connection: Connection) -> None:
    """Ask which requests it understands (ApiVersions 0)."""
    _kafka(connection, _KAFKA_API_VERSIONS, 0, b"")


def kafka_is_ready(port: int, timeout_s: float) -> None:
    """Ask for brokers and topics (Metadata 1): ready with a broker, a controller, and a leader everywhere."""
    with Connection(port, timeout_s) as connection:
        answer = _Reader(_kafka(connection, _KAFKA_METADATA, 1, struct.pack("!i", -1)))
    brokers = answer.int32()
    for _broker in range(brokers):
        answer.int32()
        answer.skip_string()
        answer.int32()
        answer.skip_string()
    if answer.int32() < 0 or brokers < 1:
        raise NoAnswer("has no active broker yet", definite=True)
    for _topic in range(answer.int32()):
        answer.int16()
        answer.skip_string()
        answer.skip(1)
        for _partition in range(answer.int32()):
            error = answer.int16()
            answer.int32()
            if error or answer.int32() < 0:
                raise NoAnswer("has partitions without a leader", definite=True)
            for _list in ("replicas", "in sync"):
                answer.skip(4 * answer.int32())


def http_lives(connection: Connection) -> None:
    """GET /livez over a kept connection and read the whole answer; any but 200 is no answer."""
    connection.send(b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    answer = b""
    while b"\r\n\r\n" not in answer and len(answer) < _ANSWER_BYTES_MAX:
        answer += connection.receive_some(65_536)
    head, _end, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.lower().split(b"\r\n")
    headers = dict(line.partition(b":")[::2] for line in lines)
    try:
        connection.receive(int(headers[b"content-length"]) - len(body))
    except (KeyError, ValueError) as error:
        raise NoAnswer("answered without a content-length", definite=True) from error
    if b" 200 " not in status + b" ":
        raise NoAnswer(f"answered {status[:40]!r}", definite=True)


def http_status(port: int, path: str, timeout_s: float) -> int:
    """Return the status that GET `path` answers."""
    connection = http.client.HTTPConnection(HOST, port, timeout=timeout_s)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        answer.read(_ANSWER_BYTES_MAX)
    except OSError as error:
        raise _no_answer(error) from error
    except http.client.HTTPException as error:
        raise NoAnswer(f"does not speak HTTP ({type(error).__name__})", definite=True) from error
    finally:
        connection.close()
    return answer.status


class _Reader:
    """Reads an answer of Kafka from front to back."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._offset = 0

    def int16(self) -> int:
        """Read a 16-bit integer."""
        return self._integer(2)

    def int32(self) -> int:
        """Read a 32-bit integer."""
        return self._integer(4)

    def skip(self, count: int) -> None:
        """Pass over bytes."""
        self._offset += count

    def skip_string(self) -> None:
        """Pass over a string, which may be null."""
        self.skip(max(0, self.int16()))

    def _integer(self, size: int) -> int:
        self._offset += size
        if self._offset > len(self._data):
            raise NoAnswer("is not a Kafka broker", definite=True)
        return int.from_bytes(self._data[self._offset - size : self._offset], "big", signed=True)


def _postgres_startup(user: str) -> bytes:
    body = struct.pack("!i", _PROTOCOL_3) + b"user\0%s\0database\0postgres\0\0" % user.encode()
    return struct.pack("!i", len(body) + 4) + body


def _postgres_send(connection: Connection, kind: bytes, body: bytes) -> None:
    connection.send(kind + struct.pack("!i", len(body) + 4) + body)


def _postgres_receive(connection: Connection) -> tuple[bytes, bytes]:
    """Return kind and body of the next message."""
    kind, size = struct.unpack("!ci", connection.receive(5))
    if not 4 <= size <= _ANSWER_BYTES_MAX:
        raise NoAnswer("is not a Postgres", definite=True)
    return kind, connection.receive(size - 4)


def _expect(connection: Connection, step: int) -> bytes:
    """Return what comes with an authentication message of the given step."""
    kind, body = _postgres_receive(connection)
    if kind != b"R" or struct.unpack_from("!i", body) != (step,):
        raise NoAnswer("does not let us in", definite=True)
    return body[4:]


def _kafka(connection: Connection, api: int, version: int, body: bytes) -> bytes:
    """Send one request and return the body of its answer."""
    correlation = 7
    client = b"ledgerproof-probe"
    header = struct.pack("!hhih", api, version, correlation, len(client)) + client
    connection.send(struct.pack("!i", len(header) + len(body)) + header + body)
    (size,) = struct.unpack("!i", connection.receive(4))
    if not 4 <= size <= _ANSWER_BYTES_MAX:
        raise NoAnswer("is not a Kafka broker", definite=True)
    answer = connection.receive(size)
    if struct.unpack_from("!i", answer) != (correlation,):
        raise NoAnswer("is not a Kafka broker", definite=True)
    return answer[4:]


def _no_answer(error: OSError) -> NoAnswer:
    if isinstance(error, TimeoutError):
        return NoAnswer("did not answer in time", definite=False)
    return NoAnswer(error.strerror or type(error).__name__, definite=True)

from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Side(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SIDE_UNSPECIFIED: _ClassVar[Side]
    BACK: _ClassVar[Side]
    LAY: _ClassVar[Side]
SIDE_UNSPECIFIED: Side
BACK: Side
LAY: Side

class DepositRequest(_message.Message):
    __slots__ = ("user_id", "key", "amount_minor")
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    AMOUNT_MINOR_FIELD_NUMBER: _ClassVar[int]
    user_id: int
    key: str
    amount_minor: int
    def __init__(self, user_id: _Optional[int] = ..., key: _Optional[str] = ..., amount_minor: _Optional[int] = ...) -> None: ...

class WithdrawRequest(_message.Message):
    __slots__ = ("user_id", "key", "amount_minor")
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    AMOUNT_MINOR_FIELD_NUMBER: _ClassVar[int]
    user_id: int
    key: str
    amount_minor: int
    def __init__(self, user_id: _Optional[int] = ..., key: _Optional[str] = ..., amount_minor: _Optional[int] = ...) -> None: ...

class PlaceBetRequest(_message.Message):
    __slots__ = ("user_id", "key", "match_id", "outcome", "side", "odds", "stake_minor")
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    MATCH_ID_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    SIDE_FIELD_NUMBER: _ClassVar[int]
    ODDS_FIELD_NUMBER: _ClassVar[int]
    STAKE_MINOR_FIELD_NUMBER: _ClassVar[int]
    user_id: int
    key: str
    match_id: str
    outcome: str
    side: Side
    odds: int
    stake_minor: int
    def __init__(self, user_id: _Optional[int] = ..., key: _Optional[str] = ..., match_id: _Optional[str] = ..., outcome: _Optional[str] = ..., side: _Optional[_Union[Side, str]] = ..., odds: _Optional[int] = ..., stake_minor: _Optional[int] = ...) -> None: ...

class CancelBetRequest(_message.Message):
    __slots__ = ("user_id", "key", "bet_id")
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    BET_ID_FIELD_NUMBER: _ClassVar[int]
    user_id: int
    key: str
    bet_id: str
    def __init__(self, user_id: _Optional[int] = ..., key: _Optional[str] = ..., bet_id: _Optional[str] = ...) -> None: ...

class RollbackRequest(_message.Message):
    __slots__ = ("user_id", "key")
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    user_id: int
    key: str
    def __init__(self, user_id: _Optional[int] = ..., key: _Optional[str] = ...) -> None: ...

class CommandReply(_message.Message):
    __slots__ = ("outcome", "replayed", "seq", "balance_minor", "bet_id", "cancelled_stake_minor", "refund_minor", "field")
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    REPLAYED_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    BALANCE_MINOR_FIELD_NUMBER: _ClassVar[int]
    BET_ID_FIELD_NUMBER: _ClassVar[int]
    CANCELLED_STAKE_MINOR_FIELD_NUMBER: _ClassVar[int]
    REFUND_MINOR_FIELD_NUMBER: _ClassVar[int]
    FIELD_FIELD_NUMBER: _ClassVar[int]
    outcome: str
    replayed: bool
    seq: int
    balance_minor: int
    bet_id: str
    cancelled_stake_minor: int
    refund_minor: int
    field: str
    def __init__(self, outcome: _Optional[str] = ..., replayed: _Optional[bool] = ..., seq: _Optional[int] = ..., balance_minor: _Optional[int] = ..., bet_id: _Optional[str] = ..., cancelled_stake_minor: _Optional[int] = ..., refund_minor: _Optional[int] = ..., field: _Optional[str] = ...) -> None: ...

class BulkRequest(_message.Message):
    __slots__ = ("commands",)
    COMMANDS_FIELD_NUMBER: _ClassVar[int]
    commands: _containers.RepeatedCompositeFieldContainer[BulkCommand]
    def __init__(self, commands: _Optional[_Iterable[_Union[BulkCommand, _Mapping]]] = ...) -> None: ...

class BulkCommand(_message.Message):
    __slots__ = ("deposit", "withdraw", "bet", "cancel")
    DEPOSIT_FIELD_NUMBER: _ClassVar[int]
    WITHDRAW_FIELD_NUMBER: _ClassVar[int]
    BET_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    deposit: DepositRequest
    withdraw: WithdrawRequest
    bet: PlaceBetRequest
    cancel: CancelBetRequest
    def __init__(self, deposit: _Optional[_Union[DepositRequest, _Mapping]] = ..., withdraw: _Optional[_Union[WithdrawRequest, _Mapping]] = ..., bet: _Optional[_Union[PlaceBetRequest, _Mapping]] = ..., cancel: _Optional[_Union[CancelBetRequest, _Mapping]] = ...) -> None: ...

class BulkReply(_message.Message):
    __slots__ = ("results",)
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[BulkResult]
    def __init__(self, results: _Optional[_Iterable[_Union[BulkResult, _Mapping]]] = ...) -> None: ...

class BulkResult(_message.Message):
    __slots__ = ("code", "detail", "reply")
    CODE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    REPLY_FIELD_NUMBER: _ClassVar[int]
    code: int
    detail: str
    reply: CommandReply
    def __init__(self, code: _Optional[int] = ..., detail: _Optional[str] = ..., reply: _Optional[_Union[CommandReply, _Mapping]] = ...) -> None: ...

class GetBalanceRequest(_message.Message):
    __slots__ = ("user_id", "strong", "min_seq", "as_of_ms")
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    STRONG_FIELD_NUMBER: _ClassVar[int]
    MIN_SEQ_FIELD_NUMBER: _ClassVar[int]
    AS_OF_MS_FIELD_NUMBER: _ClassVar[int]
    user_id: int
    strong: bool
    min_seq: int
    as_of_ms: int
    def __init__(self, user_id: _Optional[int] = ..., strong: _Optional[bool] = ..., min_seq: _Optional[int] = ..., as_of_ms: _Optional[int] = ...) -> None: ...

class Balance(_message.Message):
    __slots__ = ("user_id", "balance_minor", "seq", "source", "stale", "updated_at_ms")
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    BALANCE_MINOR_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    STALE_FIELD_NUMBER: _ClassVar[int]
    UPDATED_AT_MS_FIELD_NUMBER: _ClassVar[int]
    user_id: int
    balance_minor: int
    seq: int
    source: str
    stale: bool
    updated_at_ms: int
    def __init__(self, user_id: _Optional[int] = ..., balance_minor: _Optional[int] = ..., seq: _Optional[int] = ..., source: _Optional[str] = ..., stale: _Optional[bool] = ..., updated_at_ms: _Optional[int] = ...) -> None: ...

class GetBetRequest(_message.Message):
    __slots__ = ("user_id", "bet_id")
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    BET_ID_FIELD_NUMBER: _ClassVar[int]
    user_id: int
    bet_id: str
    def __init__(self, user_id: _Optional[int] = ..., bet_id: _Optional[str] = ...) -> None: ...

class Bet(_message.Message):
    __slots__ = ("bet_id", "match_id", "outcome", "side", "odds", "stake_minor", "reserve_minor", "state", "matched_stake_minor", "cancelled_stake_minor", "placed_at_ms")
    BET_ID_FIELD_NUMBER: _ClassVar[int]
    MATCH_ID_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    SIDE_FIELD_NUMBER: _ClassVar[int]
    ODDS_FIELD_NUMBER: _ClassVar[int]
    STAKE_MINOR_FIELD_NUMBER: _ClassVar[int]
    RESERVE_MINOR_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    MATCHED_STAKE_MINOR_FIELD_NUMBER: _ClassVar[int]
    CANCELLED_STAKE_MINOR_FIELD_NUMBER: _ClassVar[int]
    PLACED_AT_MS_FIELD_NUMBER: _ClassVar[int]
    bet_id: str
    match_id: str
    outcome: str
    side: Side
    odds: int
    stake_minor: int
    reserve_minor: int
    state: str
    matched_stake_minor: int
    cancelled_stake_minor: int
    placed_at_ms: int
    def __init__(self, bet_id: _Optional[str] = ..., match_id: _Optional[str] = ..., outcome: _Optional[str] = ..., side: _Optional[_Union[Side, str]] = ..., odds: _Optional[int] = ..., stake_minor: _Optional[int] = ..., reserve_minor: _Optional[int] = ..., state: _Optional[str] = ..., matched_stake_minor: _Optional[int] = ..., cancelled_stake_minor: _Optional[int] = ..., placed_at_ms: _Optional[int] = ...) -> None: ...

class CreateMatchRequest(_message.Message):
    __slots__ = ("match_id", "closes_at_ms", "outcomes")
    MATCH_ID_FIELD_NUMBER: _ClassVar[int]
    CLOSES_AT_MS_FIELD_NUMBER: _ClassVar[int]
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    match_id: str
    closes_at_ms: int
    outcomes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, match_id: _Optional[str] = ..., closes_at_ms: _Optional[int] = ..., outcomes: _Optional[_Iterable[str]] = ...) -> None: ...

class MatchRequest(_message.Message):
    __slots__ = ("match_id",)
    MATCH_ID_FIELD_NUMBER: _ClassVar[int]
    match_id: str
    def __init__(self, match_id: _Optional[str] = ...) -> None: ...

class SettleMatchRequest(_message.Message):
    __slots__ = ("match_id", "result")
    MATCH_ID_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    match_id: str
    result: str
    def __init__(self, match_id: _Optional[str] = ..., result: _Optional[str] = ...) -> None: ...

class ResettleMatchRequest(_message.Message):
    __slots__ = ("match_id", "key", "result", "corrects_version")
    MATCH_ID_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    CORRECTS_VERSION_FIELD_NUMBER: _ClassVar[int]
    match_id: str
    key: str
    result: str
    corrects_version: int
    def __init__(self, match_id: _Optional[str] = ..., key: _Optional[str] = ..., result: _Optional[str] = ..., corrects_version: _Optional[int] = ...) -> None: ...

class MatchReply(_message.Message):
    __slots__ = ("outcome", "replayed", "match_id", "state", "field", "settlement_version")
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    REPLAYED_FIELD_NUMBER: _ClassVar[int]
    MATCH_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    FIELD_FIELD_NUMBER: _ClassVar[int]
    SETTLEMENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    outcome: str
    replayed: bool
    match_id: str
    state: str
    field: str
    settlement_version: int
    def __init__(self, outcome: _Optional[str] = ..., replayed: _Optional[bool] = ..., match_id: _Optional[str] = ..., state: _Optional[str] = ..., field: _Optional[str] = ..., settlement_version: _Optional[int] = ...) -> None: ...

class Match(_message.Message):
    __slots__ = ("match_id", "state", "outcomes", "closes_at_ms", "settlement_version", "result", "settled")
    MATCH_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    CLOSES_AT_MS_FIELD_NUMBER: _ClassVar[int]
    SETTLEMENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    SETTLED_FIELD_NUMBER: _ClassVar[int]
    match_id: str
    state: str
    outcomes: _containers.RepeatedScalarFieldContainer[str]
    closes_at_ms: int
    settlement_version: int
    result: str
    settled: bool
    def __init__(self, match_id: _Optional[str] = ..., state: _Optional[str] = ..., outcomes: _Optional[_Iterable[str]] = ..., closes_at_ms: _Optional[int] = ..., settlement_version: _Optional[int] = ..., result: _Optional[str] = ..., settled: _Optional[bool] = ...) -> None: ...

-- The write model of one physical server. Applied once, by the owner, to an empty database.
-- Partitions of wallet_ledger are added by store.py for the logical shards the server holds.

-- name: schema
CREATE TABLE server_identity (
    only_row    boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    server_name text NOT NULL
);

-- Where each logical shard is, as far as this server knows. The row of a shard that is `here` is the truth, the others
-- are hints: of two that differ, the one with the higher epoch is newer. `epoch` counts the moves of the shard;
-- `prepared` is the epoch under which a complete, verified copy waits here to be taken over (shard_accept).
CREATE TABLE shard_routes (
    shard       smallint    PRIMARY KEY CHECK (shard BETWEEN 0 AND 99),
    server_name text        NOT NULL,
    epoch       bigint      NOT NULL DEFAULT 0,
    here        boolean     NOT NULL,
    prepared    bigint,
    changed_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    CONSTRAINT shard_routes_prepared CHECK (prepared IS NULL OR NOT here)
);

-- What every entry looks like, apart from its funds: true, or the error of the rule that is broken. One function and not
-- six constraints, because a constraint's text is parsed once more for each partition that a batch touches: as CHECKs
-- of their own these took a quarter of the time of posting (decision 0028).
CREATE FUNCTION entry_form(
    p_shard smallint, p_user bigint, p_seq bigint, p_type text, p_amount bigint, p_contra text, p_match uuid, p_key text
) RETURNS boolean LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE AS $$
DECLARE
    broken text;
BEGIN
    IF p_shard = p_user % 100 AND p_user > 0 AND p_seq > 0
       AND (CASE p_type WHEN 'DEBIT' THEN p_amount < 0
                        WHEN 'CREDIT' THEN p_amount > 0
                        WHEN 'PAYOUT' THEN p_amount > 0
                        WHEN 'REFUND' THEN p_amount > 0 ELSE false END)
       AND (CASE p_contra WHEN 'ESCROW' THEN p_match IS NOT NULL
                          WHEN 'EXTERNAL' THEN p_match IS NULL
                          WHEN 'HOUSE' THEN p_match IS NOT NULL ELSE false END)
       AND length(p_key) BETWEEN 1 AND 255
    THEN
        RETURN true;
    END IF;
    broken := CASE WHEN p_shard <> p_user % 100 THEN 'wallet_ledger_shard'
                   WHEN p_user <= 0 THEN 'wallet_ledger_user'
                   WHEN p_seq <= 0 THEN 'wallet_ledger_seq'
                   WHEN length(p_key) NOT BETWEEN 1 AND 255 THEN 'wallet_ledger_key_length'
                   WHEN (p_type = 'DEBIT' AND p_amount < 0)
                     OR (p_type IN ('CREDIT', 'REFUND', 'PAYOUT') AND p_amount > 0) THEN 'wallet_ledger_contra'
                   ELSE 'wallet_ledger_sign' END;
    RAISE EXCEPTION 'new row for relation "wallet_ledger" violates check constraint "%"', broken
        USING ERRCODE = 'check_violation', TABLE = 'wallet_ledger', CONSTRAINT = broken;
END $$;

-- Append-only. The balance of a wallet is the sum of its entries; balance_snapshot is that sum after this
-- entry, so that the newest row alone answers, and every row can be audited against the one before it.
CREATE TABLE wallet_ledger (
    shard              smallint    NOT NULL,
    user_id            bigint      NOT NULL,
    seq                bigint      NOT NULL,
    type               text        NOT NULL,
    amount             bigint      NOT NULL,
    contra             text        NOT NULL,
    match_id           uuid,
    bet_id             uuid,
    settlement_version smallint,
    balance_snapshot   bigint      NOT NULL,
    idempotent_key     text        NOT NULL,
    reference_id       text,
    created_by         text        NOT NULL,
    created_at         timestamptz NOT NULL,
    PRIMARY KEY (shard, user_id, seq),
    CONSTRAINT wallet_ledger_key UNIQUE (shard, user_id, idempotent_key),
    CONSTRAINT wallet_ledger_funds CHECK (balance_snapshot >= 0),
    CONSTRAINT wallet_ledger_form CHECK (entry_form(shard, user_id, seq, type, amount, contra, match_id, idempotent_key))
) PARTITION BY LIST (shard);

-- Second line of defence against paying twice: the business key of settlement entries.
CREATE UNIQUE INDEX wallet_ledger_business_key
    ON wallet_ledger (shard, bet_id, type, contra, settlement_version)
    WHERE settlement_version IS NOT NULL;

-- What the house advanced for wallets that had spent what a correction took back: few rows, and asked for by wallet.
CREATE INDEX wallet_ledger_advances ON wallet_ledger (shard, user_id) WHERE contra = 'HOUSE' AND type = 'CREDIT';

CREATE FUNCTION refuse_rewrite() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'wallet_ledger is append-only: % refused', TG_OP USING ERRCODE = 'integrity_constraint_violation';
END $$;

CREATE TRIGGER wallet_ledger_immutable BEFORE UPDATE OR DELETE ON wallet_ledger
    FOR EACH ROW EXECUTE FUNCTION refuse_rewrite();
CREATE TRIGGER wallet_ledger_no_truncate BEFORE TRUNCATE ON wallet_ledger
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_rewrite();

-- The order a bet's entry pays for; immutable. Its progress lives in `orders` on the match's home server.
CREATE TABLE bets (
    shard          smallint    NOT NULL,
    user_id        bigint      NOT NULL,
    bet_id         uuid        NOT NULL,
    seq            bigint      NOT NULL,
    match_id       uuid        NOT NULL,
    outcome        text        NOT NULL,
    side           text        NOT NULL CHECK (side IN ('BACK', 'LAY')),
    odds           integer     NOT NULL CHECK (odds BETWEEN 101 AND 100000),
    stake          bigint      NOT NULL CHECK (stake > 0),
    reserve        bigint      NOT NULL CHECK (reserve > 0),
    placed_at      timestamptz NOT NULL,
    PRIMARY KEY (shard, user_id, bet_id)
);

-- Refusals are answers: stored under the key, final.
CREATE TABLE refusals (
    shard          smallint    NOT NULL,
    user_id        bigint      NOT NULL,
    idempotent_key text        NOT NULL,
    outcome        text        NOT NULL,
    command        jsonb       NOT NULL,
    created_at     timestamptz NOT NULL,
    PRIMARY KEY (shard, user_id, idempotent_key)
);

-- Outbox. `id` orders the events of one wallet (they are written under its lock); across wallets it is
-- not commit order, which is why the relay goes by the flag and never by a cursor.
CREATE TABLE events (
    id                 bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    event_id           uuid        NOT NULL DEFAULT uuidv7(),
    aggregate_type     text        NOT NULL,
    aggregate_id       text        NOT NULL,
    event_type         text        NOT NULL,
    partition_key      text        NOT NULL,
    payload            jsonb       NOT NULL,
    causality_chain    uuid,
    traceparent        text,
    published_to_kafka boolean     NOT NULL DEFAULT false,
    published_at       timestamptz,
    created_at         timestamptz NOT NULL DEFAULT clock_timestamp(),
    CONSTRAINT event_published_check CHECK (published_to_kafka = (published_at IS NOT NULL))
);
CREATE INDEX events_unpublished ON events (id) WHERE NOT published_to_kafka;
-- Marking a row leaves a dead one behind; they are swept up before a poll has to step over many of them.
ALTER TABLE events SET (
    autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_threshold = 10000,
    autovacuum_analyze_scale_factor = 0.2, autovacuum_vacuum_cost_delay = 0);

-- How far the relay is with this server's events: all that was committed before complete_at_ms is in Kafka, at
-- these offsets or before them ({topic: {partition: offset}}).
CREATE TABLE relay_progress (
    only_row       boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    complete_at_ms bigint  NOT NULL DEFAULT 0,
    offsets        jsonb   NOT NULL DEFAULT '{}',
    -- How often the broker was found to have lost what it had acknowledged: offsets begin anew then.
    broker_losses  integer NOT NULL DEFAULT 0
) WITH (fillfactor = 20, autovacuum_vacuum_threshold = 1000);
INSERT INTO relay_progress DEFAULT VALUES;

-- The home side of a match: its state, its order book, its fills, its settlement.
CREATE TABLE matches (
    match_id           uuid        PRIMARY KEY,
    outcomes           text[]      NOT NULL,
    closes_at          timestamptz NOT NULL,
    state              text        NOT NULL DEFAULT 'OPEN'
                       CHECK (state IN ('OPEN', 'CLOSED', 'SETTLING', 'SETTLED', 'VOID')),
    settlement_version smallint    NOT NULL DEFAULT 0,
    result             text,
    book_version       bigint      NOT NULL DEFAULT 0,
    arrivals           bigint      NOT NULL DEFAULT 0,
    fills              bigint      NOT NULL DEFAULT 0,
    created_at         timestamptz NOT NULL DEFAULT clock_timestamp()
);
-- For the list of matches, newest first, with and without a state asked for.
CREATE INDEX matches_by_age ON matches (created_at, match_id);
CREATE INDEX matches_by_state ON matches (state, created_at, match_id);

CREATE TABLE match_transitions (
    match_id           uuid        NOT NULL REFERENCES matches,
    transition_no      integer     NOT NULL,
    from_state         text,
    to_state           text        NOT NULL,
    settlement_version smallint    NOT NULL,
    result             text,
    at                 timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (match_id, transition_no),
    UNIQUE (match_id, to_state, settlement_version)
);

-- One row per bet that reached the matcher; event_id is the inbox mark of the BetCreated event. Neither orders nor fills
-- have a foreign key to matches: the matcher, the only one to insert them, holds the lock of the match's row while it
-- does, and looking the row up again for each of them took a sixth of a batch's time.
CREATE TABLE orders (
    bet_id            uuid        PRIMARY KEY,
    match_id          uuid        NOT NULL,
    user_id           bigint      NOT NULL,
    outcome           text        NOT NULL,
    side              text        NOT NULL,
    odds              integer     NOT NULL,
    stake             bigint      NOT NULL,
    reserve           bigint      NOT NULL,
    arrival           bigint      NOT NULL,
    state             text        NOT NULL,
    matched_stake     bigint      NOT NULL DEFAULT 0,
    matched_liability bigint      NOT NULL DEFAULT 0,
    winnings          bigint      NOT NULL DEFAULT 0,
    -- The exact liability of the fills, in hundredths of a minor unit: matched_liability of a LAY is this sum
    -- rounded up once, so the next fill cannot be rounded without it.
    liability_hundredths bigint   NOT NULL DEFAULT 0,
    cancelled_stake   bigint      NOT NULL DEFAULT 0,
    cancel_refund     bigint      NOT NULL DEFAULT 0,
    cancel_reason     text CHECK (cancel_reason IN ('REQUESTED', 'LATE')),
    -- matches.book_version under which the matcher or a cancel last changed this row: what a cached book missed.
    book_version      bigint      NOT NULL DEFAULT 0,
    event_id          uuid        NOT NULL,
    traceparent       text, -- of the request that placed the bet, where that is traced
    arrived_at        timestamptz NOT NULL DEFAULT clock_timestamp(),
    UNIQUE (match_id, arrival),
    CONSTRAINT orders_stake CHECK (matched_stake + cancelled_stake <= stake),
    CONSTRAINT orders_reserve CHECK (
        cancel_refund + CASE side WHEN 'BACK' THEN matched_stake ELSE matched_liability END <= reserve)
);
CREATE INDEX orders_open ON orders (match_id, arrival) WHERE state IN ('PENDING', 'PART_MATCHED');
CREATE INDEX orders_changed ON orders (match_id, book_version);

CREATE TABLE fills (
    match_id    uuid        NOT NULL,
    fill_no     bigint      NOT NULL,
    outcome     text        NOT NULL,
    back_bet_id uuid        NOT NULL,
    back_user   bigint      NOT NULL,
    lay_bet_id  uuid        NOT NULL,
    lay_user    bigint      NOT NULL,
    odds        integer     NOT NULL,
    stake       bigint      NOT NULL CHECK (stake > 0),
    liability   bigint      NOT NULL CHECK (liability >= 0),
    winnings    bigint      NOT NULL CHECK (winnings BETWEEN 0 AND liability),
    filled_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (match_id, fill_no),
    -- Second line of defence: the book already passes over its owner's orders.
    CONSTRAINT fills_two_wallets CHECK (back_user <> lay_user)
);

-- Cancels by key; one without an order yet waits for the bet to arrive at the matcher.
CREATE TABLE cancels (
    user_id        bigint      NOT NULL,
    idempotent_key text        NOT NULL,
    bet_id         uuid        NOT NULL,
    match_id       uuid        NOT NULL,
    outcome        text        NOT NULL,
    cancelled_stake bigint     NOT NULL DEFAULT 0,
    refund         bigint      NOT NULL DEFAULT 0,
    waiting        boolean     NOT NULL,
    created_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (user_id, idempotent_key)
);
CREATE INDEX cancels_waiting ON cancels (bet_id) WHERE waiting;

CREATE TABLE settlements (
    match_id           uuid        NOT NULL REFERENCES matches,
    settlement_version smallint    NOT NULL,
    kind               text        NOT NULL CHECK (kind IN ('SETTLE', 'VOID')),
    result             text,
    state              text        NOT NULL DEFAULT 'RUNNING' CHECK (state IN ('RUNNING', 'DONE')),
    last_arrival       bigint      NOT NULL DEFAULT 0,
    -- The rate at which this match's winnings are charged: that of its first settlement, whatever is configured later.
    commission_bps     integer,
    started_at         timestamptz NOT NULL DEFAULT clock_timestamp(),
    finished_at        timestamptz,
    PRIMARY KEY (match_id, settlement_version)
);
CREATE INDEX settlements_running ON settlements (match_id) WHERE state = 'RUNNING';

-- Answers to resettles by key. Other than the steps before it, a resettle can be undone by another one, so a request
-- that is delivered late must find the answer it was given and not correct a second time.
CREATE TABLE resettles (
    match_id           uuid        NOT NULL REFERENCES matches,
    idempotent_key     text        NOT NULL,
    result             text,
    corrects           smallint,
    outcome            text        NOT NULL,
    settlement_version smallint    NOT NULL,
    created_at         timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (match_id, idempotent_key)
);

-- The read model of the wallets this server holds; updated_at is when the entry `seq` was written.
CREATE TABLE wallet_balance_projection (
    shard      smallint    NOT NULL,
    user_id    bigint      NOT NULL,
    balance    bigint      NOT NULL,
    seq        bigint      NOT NULL,
    updated_at timestamptz NOT NULL,
    PRIMARY KEY (shard, user_id),
    CONSTRAINT projection_shard CHECK (shard = user_id % 100),
    CONSTRAINT projection_user CHECK (user_id > 0),
    CONSTRAINT projection_seq CHECK (seq > 0),
    CONSTRAINT projection_balance CHECK (balance >= 0)
) WITH (fillfactor = 80);

-- Up to when the read model is complete: every entry committed before complete_at_ms is in the projection, and
-- no cached balance is older than cached_at_ms. The projectors report by partition ({"topic/partition": ms}).
CREATE TABLE projection_progress (
    only_row       boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    projected      jsonb   NOT NULL DEFAULT '{}',
    cached         jsonb   NOT NULL DEFAULT '{}',
    complete_at_ms bigint  NOT NULL DEFAULT 0,
    cached_at_ms   bigint  NOT NULL DEFAULT 0
) WITH (fillfactor = 20, autovacuum_vacuum_threshold = 1000);
INSERT INTO projection_progress DEFAULT VALUES;

-- How far a rebuild of the projection is, by shard: a rebuild that was killed goes on from here.
CREATE TABLE projection_rebuilds (
    shard       smallint    PRIMARY KEY,
    from_zero   boolean     NOT NULL,
    after_user  bigint      NOT NULL DEFAULT 0,
    wallets     bigint      NOT NULL DEFAULT 0,
    wrong       bigint      NOT NULL DEFAULT 0,
    started_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    finished_at timestamptz
);

-- Sums over the first `seq` entries of a wallet, so that its statistics cost no more the older it gets. Entries
-- never change, so a row never becomes wrong; it is only behind, and wallet_statistics reads what follows it.
CREATE TABLE wallet_stats (
    shard       smallint NOT NULL,
    user_id     bigint   NOT NULL,
    seq         bigint   NOT NULL,
    deposits    bigint   NOT NULL,
    deposited   numeric  NOT NULL,
    withdrawals bigint   NOT NULL,
    withdrawn   numeric  NOT NULL,
    bets        bigint   NOT NULL,
    staked      numeric  NOT NULL,
    payouts     bigint   NOT NULL,
    won         numeric  NOT NULL,
    refunds     bigint   NOT NULL,
    refunded    numeric  NOT NULL,
    commission  numeric  NOT NULL,
    PRIMARY KEY (shard, user_id)
);

-- name: partition
CREATE TABLE wallet_ledger_{shard} PARTITION OF wallet_ledger FOR VALUES IN ({shard});
CREATE TRIGGER wallet_ledger_{shard}_no_truncate BEFORE TRUNCATE ON wallet_ledger_{shard}
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_rewrite();

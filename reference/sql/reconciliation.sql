-- What reconciliation keeps on each server, and the gate that its findings close: payouts are posted only while
-- it is open. Applied after the write model of schema.sql.

-- name: schema
-- One row: whether payouts are paused here now, since when, by whom and why.
CREATE TABLE payout_gate (
    only_row   boolean     PRIMARY KEY DEFAULT true CHECK (only_row),
    paused     boolean     NOT NULL DEFAULT false,
    changed_by text        NOT NULL DEFAULT 'install',
    reason     text        NOT NULL DEFAULT 'installed',
    run_id     uuid,
    changed_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
INSERT INTO payout_gate DEFAULT VALUES;

-- Every time it was closed or opened. `login` is the database role that did it: nobody can claim another's.
CREATE TABLE payout_changes (
    change_no  bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    paused     boolean     NOT NULL,
    changed_by text        NOT NULL CHECK (length(changed_by) BETWEEN 1 AND 200),
    reason     text        NOT NULL CHECK (length(reason) BETWEEN 1 AND 1000),
    login      text        NOT NULL,
    run_id     uuid,
    changed_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- One row per pass over this server. `run_id` is the same on all servers of one pass.
CREATE TABLE reconciliations (
    run_no       bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    run_id       uuid        NOT NULL,
    kind         text        NOT NULL CHECK (kind IN ('FULL', 'INCREMENTAL')),
    requested_by text        NOT NULL,
    state        text        NOT NULL CHECK (state IN ('CLEAN', 'FINDINGS', 'INCOMPLETE')),
    findings     bigint      NOT NULL,
    duplicates   bigint      NOT NULL,
    entries      bigint      NOT NULL,
    events       bigint      NOT NULL,
    records      bigint      NOT NULL,
    problems     text[]      NOT NULL,
    started_at   timestamptz NOT NULL,
    finished_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    UNIQUE (run_id)
);

-- What was found, up to a bound per code and pass; reconciliations.findings counts all of it.
CREATE TABLE reconciliation_findings (
    run_no       bigint      NOT NULL REFERENCES reconciliations ON DELETE CASCADE,
    finding_no   integer     NOT NULL,
    code         text        NOT NULL,
    user_id      bigint,
    seq          bigint,
    match_id     text,
    event_id     text,
    topic        text,
    partition    integer,
    kafka_offset bigint,
    expected     text        NOT NULL,
    found        text        NOT NULL,
    PRIMARY KEY (run_no, finding_no)
);

-- Up to which block of which file of a logical shard's partition the incremental pass has looked. A partition
-- that was copied to another server is another file there, and is looked through from its beginning.
CREATE TABLE reconciliation_positions (
    shard       smallint    PRIMARY KEY,
    file        bigint      NOT NULL,
    blocks      bigint      NOT NULL,
    verified_at timestamptz NOT NULL
);

-- The same for what has no shard: `events` (id), `settlements` (microseconds since 1970), `<topic>/<partition>`.
CREATE TABLE reconciliation_marks (
    name     text   PRIMARY KEY,
    position bigint NOT NULL
);

-- name: functions
-- Let payouts through, or refuse all of them. Takes part in the caller's transaction: while one that was let through
-- is not over, nobody gets the gate closed, so that once it is closed nothing is paid any more.
CREATE FUNCTION payouts_open() RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, public AS $$
DECLARE
    gate payout_gate;
BEGIN
    PERFORM pg_advisory_xact_lock_shared(9, 1);
    -- A statement of its own: only one begun after the lock was granted sees what its last holder committed.
    SELECT * INTO gate FROM payout_gate;
    IF gate.paused THEN
        RAISE EXCEPTION 'payouts are paused here since % by %: %', gate.changed_at, gate.changed_by, gate.reason
            USING ERRCODE = 'LP001';
    END IF;
END $$;

-- Close the gate and return whether that changed anything; waits for payouts that are under way.
CREATE FUNCTION payouts_pause(p_by text, p_reason text, p_run uuid) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, public AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(9, 1);
    UPDATE payout_gate SET paused = true, changed_by = p_by, reason = p_reason, run_id = p_run,
                           changed_at = clock_timestamp()
     WHERE NOT paused;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    INSERT INTO payout_changes (paused, changed_by, reason, login, run_id)
        VALUES (true, p_by, p_reason, session_user, p_run);
    RETURN true;
END $$;

-- Open the gate again and return whether that changed anything.
CREATE FUNCTION payouts_resume(p_by text, p_reason text) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, public AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(9, 1);
    UPDATE payout_gate SET paused = false, changed_by = p_by, reason = p_reason, run_id = NULL,
                           changed_at = clock_timestamp()
     WHERE paused;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    INSERT INTO payout_changes (paused, changed_by, reason, login) VALUES (false, p_by, p_reason, session_user);
    RETURN true;
END $$;

-- name: grants
-- Begins with nothing for anybody, also for what will be created later.
REVOKE ALL ON SCHEMA public FROM PUBLIC;
ALTER DEFAULT PRIVILEGES REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC;
GRANT USAGE ON SCHEMA public TO ledger_api, ledger_relay, ledger_matcher, ledger_settler, ledger_projector,
    ledger_auditor, ledger_reconciler, ledger_operator;
GRANT SELECT ON wallet_ledger, bets, events, matches, orders, settlements, wallet_balance_projection, payout_gate,
    reconciliations, reconciliation_findings, reconciliation_positions, reconciliation_marks TO ledger_reconciler;
GRANT INSERT, DELETE ON reconciliations, reconciliation_findings TO ledger_reconciler;
GRANT INSERT, UPDATE, DELETE ON reconciliation_positions, reconciliation_marks TO ledger_reconciler;
GRANT EXECUTE ON FUNCTION payouts_pause TO ledger_reconciler, ledger_operator;
GRANT EXECUTE ON FUNCTION payouts_resume TO ledger_operator;
GRANT SELECT ON payout_gate, payout_changes, reconciliations, reconciliation_findings TO ledger_operator;

-- name: connections
-- No role of the service may use another database, nor make temporary tables in this one.
REVOKE ALL ON DATABASE {database} FROM PUBLIC;
GRANT CONNECT ON DATABASE {database} TO ledger_api, ledger_relay, ledger_matcher, ledger_settler, ledger_projector,
    ledger_auditor, ledger_reconciler, ledger_operator;
REVOKE ALL ON DATABASE postgres, template1 FROM PUBLIC;

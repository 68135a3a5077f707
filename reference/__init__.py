"""The reference service: a ledger-first betting exchange on sharded Postgres, Kafka and Redis."""

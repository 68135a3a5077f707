"""The gRPC interface: `ledger.proto` and the code generated from it (`make` has no part in it: see docs/api.md)."""

"""The architecture's deployment checklist as checks that look at a running stack."""

"""Planted bugs: patches of the product and of the harness, each of which the harness must notice."""

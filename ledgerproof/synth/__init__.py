"""Writes synthetic runs of any size: honest in every detail the checks look at, or with one planted violation."""

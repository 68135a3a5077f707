"""Plans: what clients do, what is broken and where it fails, in one file that can be run again."""

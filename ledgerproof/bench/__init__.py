"""The benchmark: floors, rates and what explains them, measured in one run on one machine."""

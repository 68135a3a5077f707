"""The stack: real servers and service processes, started, broken, healed and removed by one controller."""

"""The capacity model: closed forms of queueing theory and a SimPy model of the command path that agrees with them."""

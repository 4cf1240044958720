"""localcloud: the slice of Google Cloud that the program uses, on one machine and on loopback only."""

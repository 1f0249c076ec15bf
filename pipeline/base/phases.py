"""The phases of an optimizer step, by which its time is told apart."""

PHASES = ("data", "host_to_device", "forward", "backward", "communication", "update", "graph", "other")
"""In the order of a step. `communication` is what of it is not hidden behind `backward`, waiting for other ranks
included; `graph` is all from `data` to `update` where that is replayed as one; `other` is the loop's book-keeping."""

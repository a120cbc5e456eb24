"""Workers of other engines, each in a process of its own, and the protocol that all workers speak."""

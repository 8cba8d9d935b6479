"""observe (I/O) → plan (pure) → apply (I/O): the store of what was seen, the queue of what to look at, one module per kind."""

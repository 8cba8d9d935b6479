"""`spec.source` of adapters, models and artifacts: one model per kind of source."""

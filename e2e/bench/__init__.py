"""Measurements on the running demo; figures go into notes, never into tests."""

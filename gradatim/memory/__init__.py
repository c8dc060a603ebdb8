"""Judged decision memory: what was said of an answer changes the next one in its situation, before any weights do."""

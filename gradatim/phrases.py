"""Beginnings of answers that say what kind of answer it is. English only; knows no model."""

from __future__ import annotations

REFUSALS = ("I'm sorry", "I am sorry", "Sorry,", "I cannot", "I can't", "As an AI")
FLATTERIES = ("Great question", "What a great", "You're absolutely right", "You are absolutely right", "Excellent")

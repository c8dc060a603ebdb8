"""Agents that learn in production: serve, remember, learn, and earn every promotion."""

__version__ = "0.1.0"

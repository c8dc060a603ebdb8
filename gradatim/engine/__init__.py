"""Engines: what turns a request into tokens under a named adapter."""

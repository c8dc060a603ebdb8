"""What speaks of an episode beside people: critics (programs that judge it) and implicit signals of its course."""

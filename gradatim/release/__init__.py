"""Which weights answer whom: routing, and the gates a candidate has to pass."""

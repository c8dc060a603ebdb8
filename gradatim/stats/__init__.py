"""Statistics that know nothing of records: numpy and scipy only."""

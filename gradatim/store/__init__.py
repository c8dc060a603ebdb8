"""The store: every record, in one append-only log, on SQLite or PostgreSQL.

    with open_store("data/gradatim.db") as store:
        store.append(step)

Knows the records and how to keep them; knows nothing of what they mean to serving or learning.
"""

from gradatim.store.exclusive import Exclusive
from gradatim.store.shelf import SqlShelf
from gradatim.store.sql import SqlStore, open_store

__all__ = ["Exclusive", "SqlShelf", "SqlStore", "open_store"]

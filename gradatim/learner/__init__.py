"""Makes new adapters from examples, says how well adapters do, and remembers what to rehearse."""

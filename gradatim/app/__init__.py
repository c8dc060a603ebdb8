"""The composition root: the only place that names concrete classes and puts the parts together.

    home        the data directory: files, locks, who runs
    compose     builds the parts from the configuration
    serving     the server process of ``gradatim serve``
    supervisor  keeps the loop process alive beside it
    learning    the loop process; ``gradatim learn``

Nothing here imports torch before the process knows its threads (``home``, ``supervisor`` never do).
"""

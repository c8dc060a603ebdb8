"""``python -m gradatim`` is the ``gradatim`` command."""

from gradatim.cli import main

if __name__ == "__main__":
    main()

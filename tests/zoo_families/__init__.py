"""The families of maps that ``tests/zoo.py`` gathers, one subject a file."""

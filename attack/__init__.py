"""Model inversion of a trained target. Open attacks.py for the table, access.py for who holds what."""

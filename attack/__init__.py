"""Model inversion of a trained run. Open attacks.py for the table, access.py for who holds what."""

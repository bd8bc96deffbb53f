"""Attacks on a trained run. Open attacks.py and members.py for the tables, access.py for who holds what."""

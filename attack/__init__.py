"""Attacks on a trained run. Open attacks.py for inversion, members.py for membership, access.py for who holds what."""

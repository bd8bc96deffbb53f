"""Attacks on a trained run. Open attacks.py and members.py for the tables, adversaries.py for what each holds."""

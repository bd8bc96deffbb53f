"""Model inversion of a trained run. attacks.py has the table of attacks, access.py what adversaries have."""

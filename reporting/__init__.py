"""The report on all runs: summary.py reads them, leakage.py what attacks found, page.py makes the HTML."""

"""The page of all runs. Open it for what report.html shows."""

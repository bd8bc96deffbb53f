"""The page of all runs. Open it for what report.html shows, and how it is worked out."""

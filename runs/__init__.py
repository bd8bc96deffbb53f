"""A run's folders: CSVs, checkpoints, resuming, pictures. Open it for what is written where, and when."""

"""The server: what it makes of uploads, and who would deceive it. Open it for a rule, a noise or a weight."""

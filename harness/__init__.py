"""The instrument: one run, start to end."""

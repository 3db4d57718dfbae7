"""Processes, cores and signals: what runs beside each other, and how it stops."""

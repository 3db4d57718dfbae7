"""From runs to paper: `from analysis import load_runs, select, tables` gives DataFrames. Needs no torch."""

from analysis.load import load_runs

__all__ = ["load_runs"]

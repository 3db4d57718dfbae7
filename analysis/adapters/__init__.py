"""What runs have learned, read from the weights that they saved: no training, and for most of it no forward pass.

    saved runs --harness.deltas--> delta weights --measures--> frames --tables, figures--> reports/<sweep>/adapters/

It alone of the analysis package loads torch and models; a report of scores and costs does without it.
"""

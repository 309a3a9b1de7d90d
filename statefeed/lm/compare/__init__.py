"""Comparison of runs: the compare and report commands, results, tables and figures."""

"""Several runs side by side: the compare and report commands, results, tables and figures."""

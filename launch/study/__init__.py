"""A study of several memories: its settings, results and figures."""

"""The studies of the papers: their tasks, what is measured, and reports over many runs."""

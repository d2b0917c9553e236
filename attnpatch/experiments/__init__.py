"""The studies of the papers, a package each: its config, data, model, trainer and whole run."""

"""The attention methods as plain tensor functions; import from the submodules."""

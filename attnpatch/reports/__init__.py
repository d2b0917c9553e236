"""`attnpatch report`: results of many runs, compared."""

"""`make demo`: one Marian on a synthetic corpus, converted to every variant, trained on and scored."""

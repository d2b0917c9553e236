"""The GLUE-style study of alignment and query_value: sentences and pairs of sentences, classified or rated."""

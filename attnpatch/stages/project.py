"""Stage 1, project: hidden states -> query, key, value, and heads -> output.

The stock form is the `nn.Linear` that the model came with. A variant puts a module of its own in its place,
called as the linear was: [..., in_features] -> [..., out_features].
"""

"""The NT tasks: softmax against expressive attention in small decoders."""

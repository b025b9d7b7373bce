"""The five stages of layer fusion, one module each, in running order:
activations, manifold, similarity, alignment, fusion."""

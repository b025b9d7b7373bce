"""The published method, one stage a module, in running order: activations, manifold, similarity, alignment, fusion."""

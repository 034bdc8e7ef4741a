"""The paper's concepts: NormRef R, NormStats S, NormOP N, and the layer that they define. No state, no modules."""

"""How θ and φ are inferred: protocols, guides, objectives and the methods."""

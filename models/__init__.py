"""The zoo: one file for each published system, on the public API of bayesmeta alone; imported as `bayesmeta.models`."""

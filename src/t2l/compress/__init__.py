"""A library of adapters as one network: planned, trained by reconstruction, evaluated, and reported on."""

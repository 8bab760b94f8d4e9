"""txcore: explicit collectives for JAX, and proof of what is on the wire."""

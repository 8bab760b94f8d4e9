"""The data of the example: found, downloaded, read, checked and cut into batches. Without jax."""

"""The structure of a Jacobian, read from the ops that a function runs; nothing is differentiated."""

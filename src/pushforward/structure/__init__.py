"""The structure of a Jacobian, read from the ops that run; nothing is differentiated."""

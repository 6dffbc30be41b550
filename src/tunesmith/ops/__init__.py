"""Pure functions on tensors: no module, no global state. One folder an op, each with a readable reference."""

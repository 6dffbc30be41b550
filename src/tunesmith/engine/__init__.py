"""What runs inside a training step: attention per document, the loss without logits, and the probes that allow them."""

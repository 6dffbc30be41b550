"""Training for tasks other than language modelling: recipes (batch, loss, prediction, score), the trainer, its runs."""

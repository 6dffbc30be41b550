"""What leaves a run: adapter folders and their model cards."""

"""What the commands share: recipes, runs, the trainer, metrics and costs."""

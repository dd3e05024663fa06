"""Images and latents, from disk to batches."""

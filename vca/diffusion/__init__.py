"""Objectives and samplers of the generators, and the autoencoder of their latents."""

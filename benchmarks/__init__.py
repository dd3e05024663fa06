"""What attention costs (`benchmarks.attention`), how faithful maps are, and what the app bears."""

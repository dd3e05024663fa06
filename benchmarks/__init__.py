"""What attention costs (`benchmarks.attention`), and the sizes of the paper's models (`benchmarks.table`)."""

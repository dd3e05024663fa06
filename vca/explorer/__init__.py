"""The explorer: all maps of one forward pass as a web page on which every head, stage and query can be clicked."""

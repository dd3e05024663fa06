"""What writes pages of docs/ or pictures."""

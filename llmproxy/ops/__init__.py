"""What the operator touches."""

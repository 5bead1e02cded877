"""What a client touches."""

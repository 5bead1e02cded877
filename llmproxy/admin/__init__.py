"""The admin site: what an operator reads and changes."""

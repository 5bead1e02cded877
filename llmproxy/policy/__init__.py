"""Who may do what, and where it goes."""

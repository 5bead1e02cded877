"""What several processes and hosts know together, through Redis or Valkey."""

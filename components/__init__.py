"""What the stack is made of: one ComponentResource a file, and the typed configuration."""

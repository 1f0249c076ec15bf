"""A page that compares runs from their folders alone."""

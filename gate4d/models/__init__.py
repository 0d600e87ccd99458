"""Small models of this library."""

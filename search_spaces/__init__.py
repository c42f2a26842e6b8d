"""What may vary: typed domains, named spaces, and the identity of a config."""

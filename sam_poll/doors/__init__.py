"""Doors: where jobs come from and answers go."""

"""Commands that examine instead of predict: `check` (`validate`), `doctor` and `bench`."""

"""Plain PyTorch implementations: the oracle of every kernel, and the fallback on any device."""

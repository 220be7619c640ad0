"""Host side of the backends: what runs where, allocation, launch."""
